"""The bench of evaluations beside training, in small: the real hub and spread under a simulated clock."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import warm

BENCH = Path(__file__).parents[1] / "bench" / "evaluation" / "simulation.py"


def simulated(*options: str) -> dict[str, Any]:
    done = warm.run([str(BENCH), *options, "--json"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_evaluations_that_never_stop_leave_neither_engines_nor_trainer_idle() -> None:
    """1,200 completions for each evaluation, and 256 rollouts between two: the next is due before one is served."""
    small = ("--steps", "10", "--every", "1", "--staleness", "2", "--engines", "2", "--ranks", "2")
    found = simulated(*small, "--set", 'eval.benchmarks=["aime24", "amc"]')
    assert found["missing"] == []
    assert found["evaluations"][0] == [0, 0] and found["evaluations"][-1][0] == 10
    assert len(found["evaluations"]) < 8, "some stand for several that became due"
    assert found["ratio"] <= 1.15
    assert found["limit"] == "evaluation" and found["evaluation_share_of_tokens"] > 0.5
