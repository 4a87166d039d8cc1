"""The recipe tiny-tool, as a command: a model that calls a calculator is trained and evaluated in episodes, and a run
that was killed on its way ends in the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from loop.exactness import difference, digests
from loop.kill_resume import Attempt
from shared import records, trained

STEPS = 3
QUICK = [
    f"train.steps={STEPS}", "train.batch_groups=2", "train.minibatches=2", "checkpoint.every=1", "eval.every=3",
    "eval.samples=1", "eval.pass_k=1", "launch.deterministic=true", "metrics.samples_per_step=16",
]  # fmt: skip
pytestmark = pytest.mark.timeout(900)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_tools_are_trained_evaluated_and_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, console = Attempt(first, QUICK, resume=False, recipe="tiny-tool-m2po-delta").end(600)
    assert code == 0, console
    steps = trained(records(first))
    assert all(step["parity_mean_abs"] < 1e-4 and step["parts/turns"] > 1 for step in steps)
    samples = lines(first / "samples")
    two = [sample for sample in samples if sample["parts"]["turns"] == 2 and not sample["parts"]["tool_errors"]]  # type: ignore[index]
    assert two and all(0 in sample["loss_mask"] for sample in two)  # type: ignore[operator]
    assert any(sample["reward"] == 1.0 for sample in two) and "<tool_response>" in str(two[0]["completion"])
    evaluated = [record for record in records(first) if record.get("benchmark") == "arithmetic-products-heldout"]
    assert [record["step"] for record in evaluated] == [0, STEPS]
    assert 0.2 < evaluated[0]["eval_avg_at_n"] < 0.5, "the shipped model is unsure"
    assert 1.5 < evaluated[0]["eval_turns_mean"] < 2.5 and evaluated[0]["eval_tool_errors_mean"] > 0

    killed = Attempt(second, QUICK, resume=False, recipe="tiny-tool-m2po-delta")
    assert killed.wait(lambda: 1 in killed.steps() and killed.kill("supervisor"), 300), killed.end()[1]
    assert killed.end()[0] == -9
    code, console = Attempt(second, [], resume=True).end(600)
    assert code == 0, console
    assert len(digests(first)) == 1 + 2 + 1 + STEPS
    assert difference(first, second, whole=False) == []
