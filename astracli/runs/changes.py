"""What a run's recipe was changed to on the way: RUN_DIR/changes.jsonl, one line for each resume that changed it.

    {"time", "step", "attempt", "changes": {"train.learning_rate": [1e-05, 5e-06]}}

`step` is the first step that was trained with the new values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

Changes = Mapping[str, Sequence[Any]]
"""Dotted key -> (value before, value from then on)"""


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ in two recipe documents, each with both; None where a side has no value."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return found


def record(run: RunDir, step: int, attempt: int, changes: Changes) -> dict[str, Any] | None:
    """Write down what an attempt that begins at `step` changes. -> the line; None when it changes nothing."""
    if not changes:
        return None
    line = {"time": time.time(), "step": step, "attempt": attempt, "changes": {k: list(v) for k, v in changes.items()}}
    metrics.mend(run.changes_jsonl)
    with run.changes_jsonl.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def read(run: RunDir) -> list[dict[str, Any]]:
    """The lines of `changes.jsonl`, oldest first; [] for a run that kept its recipe, and where none can be read."""
    try:
        return metrics.read(run.changes_jsonl)
    except OSError:
        return []


def words(line: Mapping[str, Any]) -> str:
    """`from step 20: train.learning_rate 1e-05 -> 5e-06, train.steps 40 -> 80`"""
    each = ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in line["changes"].items())
    return f"from step {line['step']}: {each}"


def shown(value: Any) -> str:
    """A recipe value as `--set` takes it: `none`, `true`, a bare string, else JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
