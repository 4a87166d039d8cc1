"""The recipe tiny-tool, as a command: a model that calls a calculator is trained and evaluated in episodes, and a run
that lost a process on its way ends in the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import warm

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import shared
from loop.exactness import difference, digests
from loop.kill_resume import Attempt
from shared import records, trained

from astracli.data import arithmetic

STEPS, ITEMS, RECIPE = 2, 32, "tiny-tool-m2po-delta"
pytestmark = pytest.mark.timeout(900)


def quick(folder: Path) -> list[str]:
    """Settings of both runs."""
    products = folder / "products.jsonl"
    items = [{"problem": p.question, "answer": p.answer} for p in arithmetic.held_out(ITEMS, ["mul2", "mul3"])]
    products.write_text("\n".join(map(json.dumps, items)))
    return [
        f"train.steps={STEPS}", "train.batch_groups=2", "train.minibatches=2", "checkpoint.every=1",
        "rollout.group_size=4", "rollout.max_new_tokens=48", "rollout.context_length=64",
        f'eval.benchmarks=["{products}"]', f"eval.every={STEPS}", "eval.samples=1", "eval.pass_k=1",
        "launch.deterministic=true", "metrics.samples_per_step=16",
    ]  # fmt: skip


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_tools_are_trained_evaluated_and_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "start", warm.bench_start)  # other tests show that a run starts by itself
    first, second, settings = tmp_path / "first", tmp_path / "second", quick(tmp_path)
    code, console = Attempt(first, settings, resume=False, recipe=RECIPE).end(600)
    assert code == 0, console
    steps = trained(records(first))
    assert all(step["parity_mean_abs"] < 1e-4 and step["parts/turns"] > 1 for step in steps)
    samples = lines(first / "samples")
    two = [sample for sample in samples if sample["parts"]["turns"] == 2 and not sample["parts"]["tool_errors"]]  # type: ignore[index]
    assert two and all(0 in sample["loss_mask"] for sample in two)  # type: ignore[operator]
    assert any(sample["reward"] == 1.0 for sample in two) and "<tool_response>" in str(two[0]["completion"])
    evaluated = [record for record in records(first) if record.get("process") == "eval" and "eval_turns_mean" in record]
    assert [record["step"] for record in evaluated] == [0, STEPS]
    assert 0.15 < evaluated[0]["eval_avg_at_n"] < 0.6, "the shipped model is unsure"
    assert 1.5 < evaluated[0]["eval_turns_mean"] < 2.5 and evaluated[0]["eval_tool_errors_mean"] > 0

    killed = Attempt(second, [*settings, "launch.max_resumes=1"], resume=False, recipe=RECIPE)
    there = second / "checkpoints" / "step_000001" / "COMPLETE"  # from which all of its processes begin anew
    assert killed.wait(lambda: there.exists() and killed.steps() and killed.kill("trainer"), 300), killed.end()[1]
    code, console = killed.end(600)
    assert code == 0 and "goes on from the checkpoint of step 1, time 1 of 1" in console, console
    assert len(digests(first)) == 1 + 2 + 1 + STEPS
    assert difference(first, second, whole=False) == []
