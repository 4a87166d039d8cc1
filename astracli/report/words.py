"""How figures of a run are written everywhere: seconds, bytes, a benchmark and its grader, an evaluation's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def judged(benchmark: str, figures: Mapping[str, Any]) -> str:
    """A benchmark with what graded it: `my_set (pkg.module:reward)`."""
    return f"{benchmark} ({figures['grader']})" if figures.get("grader") else benchmark


def evaluated(step: int | None, due_step: int) -> str:
    """`step 13 (due at 10)`, or `step 10` of one that did not have to wait for an earlier one."""
    return f"step {step}" + (f" (due at {due_step})" if due_step != step else "")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float | None) -> str:
    """Bytes as `1.9 MB` (decimal units)."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
