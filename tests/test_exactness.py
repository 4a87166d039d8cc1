"""Deterministic mode in real processes: the same bytes again, and after kill -9 and resume at several points."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from loop.exactness import SMALL, difference, digests, figures
from loop.kill_resume import Attempt
from shared import records

QUICK = ["eval.samples=1", "eval.pass_k=1"]

STEPS = 4
pytestmark = pytest.mark.timeout(600)  # five runs, one after the other, on whatever else the machine does


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, console = Attempt(run, [f"train.steps={STEPS}", *SMALL, *QUICK], resume=False).end()
    assert code == 0, console
    return run


def killed(run: Path, victim: str, ready: Callable[[Attempt], bool]) -> None:
    """One attempt, new or resumed, that loses `victim` when it is ready."""
    resume = run.exists()
    attempt = Attempt(run, [] if resume else [f"train.steps={STEPS}", *SMALL, *QUICK], resume=resume)
    assert attempt.wait(lambda: ready(attempt) and attempt.kill(victim)), attempt.end()[1]
    code, console = attempt.end()
    assert code == (-9 if victim == "supervisor" else 1), console


def test_a_run_killed_three_times_ends_in_the_same_bytes(undisturbed: Path) -> None:
    run = undisturbed.parent / "killed"
    killed(run, "rollout", lambda attempt: len(attempt.steps()) >= 1)  # before any checkpoint
    killed(run, "supervisor", lambda attempt: attempt.child("eval") is not None and attempt.seconds > 2)
    last = Attempt(run, ["launch.max_resumes=1"], resume=True)
    # past the checkpoint of two steps; from there it goes on by itself, in the same attempt
    assert last.wait(lambda: 2 in last.steps() and last.kill("trainer")), last.end()[1]
    code, console = last.end()
    assert code == 0 and "the run goes on from the checkpoint of step 2, time 1 of 1" in console, console
    assert len(digests(undisturbed)) == 1 + 3 + 1 + STEPS, (
        "weights, three evaluations, their table, four steps' samples"
    )
    assert {key[:2] for key in figures(undisturbed)} == {
        *(("trainer", step) for step in range(STEPS)),
        *(("eval", step) for step in (0, 2, 4)),
    }
    assert difference(undisturbed, run, whole=False) == []


def test_the_comparison_sees_one_bit_and_one_figure(undisturbed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part in ("export", "eval", "samples"):
        shutil.copytree(undisturbed / part, other / part)
    lines = (undisturbed / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines)
    assert difference(undisturbed, other, whole=True) == []
    weights = other / "export" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    loss = next(record["loss"] for record in records(undisturbed) if record.get("loss") and record["step"] == 2)
    (other / "metrics.jsonl").write_text(lines.replace(json.dumps(loss), json.dumps(loss * 1.001)))
    assert difference(undisturbed, other, whole=True) == ["export/model.safetensors", "('trainer', 2, None, True)"]
