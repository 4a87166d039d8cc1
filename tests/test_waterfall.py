"""`bench/loop/waterfall.py`: the losses between the trainer alone and the whole loop, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from loop import waterfall  # type: ignore[import-not-found]


def record(step: int, **more: float) -> dict[str, object]:
    seconds = {"forward_s": 2.0, "backward_s": 5.0, "optimizer_s": 1.0, "score_s": 2.0, "check_s": 0.0, "batch_s": 0.5}
    seconds |= {"publish_s": 0.5, "wait_s": 4.0, "step_s": 16.0}
    return {"process": "trainer", "step": step, "tokens": 8000.0, "row_tokens": 5000.0} | seconds | more


def test_every_loss_by_hand() -> None:
    """8,000 trained of 10,000 tokens a step, on two ranks. 2,000 whole tokens/s alone are 1,600 trained ones."""
    updates = [
        {"process": "rollout", "step": 1, "interval_s": 10.0, "idle_s": 5.0, "held_idle_s": 3.0, "slots_busy": 0.5},
        {"process": "rollout", "step": 2, "interval_s": 10.0, "idle_s": 1.0, "pause_s": 0.02},
        {"process": "rollout", "step": 0, "interval_s": 90.0, "idle_s": 90.0},
    ]
    first = record(0, step_s=48.0, check_s=30.0)
    found = waterfall.fall([first, record(1), record(2), *updates], 2, alone=2000.0)
    lines = {line["what"]: line for line in found["waterfall"]}
    rates = {what: line["tokens_per_s"] for what, line in lines.items()}
    assert rates == pytest.approx({
        "trainer alone": 1600.0, "passes and update": 8000 / 8, "score": 8000 / 10, "check": 8000 / 10,
        "batch": 8000 / 10.5, "publish": 8000 / 11, "checkpoint": 8000 / 11, "at work": 8000 / 12,
        "waiting": 8000 / 16, "first 1": 24000 / 80,
    })  # fmt: skip
    assert sum(line["lost_per_s"] or 0.0 for line in found["waterfall"]) == pytest.approx(1600.0 - 300.0)
    assert lines["score"]["lost_share"] == pytest.approx(200 / 1600)
    assert "backward 5.00 s" in lines["passes and update"]["why"] and "48.0 s" in lines["first 1"]["why"]
    assert found["engines"] == pytest.approx(
        {"idle_share": 0.15, "held_share": 0.15, "slots_busy": 0.5, "pause_s": 0.02}
    )


def test_without_a_figure_of_the_trainer_alone_it_begins_with_the_passes() -> None:
    found = waterfall.fall([record(0), record(1)], 1, skip=0)
    assert [line["what"] for line in found["waterfall"]][:2] == ["passes and update", "score"]
    assert found["waterfall"][0]["lost_per_s"] is None and found["engines"] == {}
    with pytest.raises(ValueError, match="1 steps are too few: 1 are left out"):
        waterfall.fall([record(0)], 1)
