"""What a plan leaves free of a GPU for what its estimates miss: by hand, and on the machines that recipes name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machines import GIB, facts
from test_plan import load, memory_warnings, planned
from test_plan_speed import SHAPE

from astracli.machine.memory import Component, MemoryRow, words
from astracli.plan import build as plan
from astracli.plan import gpus as plan_margin
from astracli.plan.cost import TrainerLoad
from astracli.plan.gpus import Margin
from astracli.plan.seats import GpuId
from astracli.plan.trainer import trainer_rows
from astracli.plan.view import render, to_json, what

G0, G1 = GpuId(0), GpuId(1)
ONE_EACH = ("resources.rollout_gpus=1", "resources.train_gpus=1")


def row(process: str, size: int, basis: Any, part: Component = Component.PROCESS, **more: Any) -> MemoryRow:
    return MemoryRow(process, part, "gpu", size, basis, **more)


def test_half_of_what_is_estimated_there_at_once() -> None:
    """Counted rows need none, nor does what finds another place; of two that share in time the larger counts."""
    rows = [
        row("engine0", 100, "counted", away=True),
        row("engine0", 40, "estimated", away=True),
        row("engine0", 10, "estimated"),
        row("engine0", 1000, "estimated", fixed=False),
        row("trainer", 200, "counted", away=True),
        row("trainer", 20, "estimated", away=True),
        row("trainer", 8, "estimated", Component.CACHE_HOLES, fixed=False, away=True),
        row("trainer1", 300, "counted"),
        replace(row("trainer1", 30, "estimated"), where="host"),
    ]
    found = plan_margin.margins(
        rows, {G0: ["engine0", "trainer"], G1: ["trainer1"], GpuId(2): ["elsewhere"]}, {G0: 240, G1: 299}
    )
    assert found == (Margin(G0, 10 + 228, 5 + 14, 2), Margin(G1, 300, 0, -1))
    assert [each.short for each in found] == [True, True]
    assert plan_margin.warnings(found) == [
        "GPU 0: 2 B are left beside the 238 B that are planned, where the estimates need a margin of 19 B: it may run "
        "out of memory"
    ], "one that does not fit at all is refused"


def test_gpus_that_hold_the_same_are_said_once() -> None:
    found = [Margin(GpuId(gpu), 10 * GIB, GIB, 2 * GIB) for gpu in (0, 1, 2, 5)] + [
        Margin(GpuId(6), 5 * GIB, GIB, 7 * GIB)
    ]
    said = plan_margin.reasons(found)
    why = "50% of what is estimated; 10.00 GiB are planned of 12.00 GiB, which leaves 2.00 GiB"
    assert said[0] == ("margin of GPU 0 and 1 and 2 and 5", "1.00 GiB", why)
    assert said[1][:2] == ("margin of GPU 6", "1.00 GiB")


@pytest.mark.parametrize("name", ["qwen3.5-4b-m2po-delta", "qwen3.5-4b-m2po-full"])
def test_the_flagship_on_eight_l40(name: str) -> None:
    """40.4 GiB of 44 had been planned, without the holes of torch's cache: 2.4 left for 8.0 of estimates."""
    result = planned(load(name), facts("8.9", 8, memory_gib=44, host_gib=512))
    plan.refuse(result)
    assert not memory_warnings(result) and [each.gpu for each in result.margins] == [GpuId(i) for i in range(8)]
    assert all(each.left >= each.needed > GIB for each in result.margins)
    trainers = result.margins[4:]
    assert len({(each.planned, each.needed, each.left) for each in trainers}) == 1
    estimated = [r.bytes for r in result.memory if r.process == "trainer" and r.where == "gpu" and r.basis != "counted"]
    assert trainers[0].needed == pytest.approx(sum(estimated) / 2, abs=8) and sum(estimated) > 4 * GIB
    assert trainers[0].planned + trainers[0].left == 44 * GIB
    assert 1.1 * trainers[0].planned <= 44 * GIB, "a tenth over the plan would still fit"
    (said,) = [r for t in render(result) for r in t.rows if r[0] == "margin of GPU 4 to 7"]
    assert said[1] == words(trainers[0].needed)
    assert to_json(result)["margins"][4]["needed"] == trainers[0].needed


def test_what_an_adapter_does_not_say_of_its_blocks_is_estimated() -> None:
    known, guessed = (
        {what(r): r.basis for r in trainer_rows("t", TrainerLoad(load("qwen3.5-4b-m2po-delta"), shape, 1), "cuda")}
        for shape in (SHAPE, replace(SHAPE, block_activations=()))
    )
    assert (known["activations"], guessed["activations"]) == ("counted", "estimated")


def test_a_plan_without_room_for_its_margin_is_taken_last_and_says_so() -> None:
    tight = planned(load("qwen3.5-4b-m2po-delta", *ONE_EACH), facts("9.0", 2, memory_gib=42, host_gib=512))
    plan.refuse(tight)
    (warning,) = memory_warnings(tight)
    assert warning.startswith("GPU 1: 379.7 MiB are left beside the 41.63 GiB that are planned")
    shared = (*ONE_EACH, "resources.share_gpus=true")
    for gib in (80, 100, 140.4):
        side_by_side = planned(load("qwen3.5-4b-m2po-delta", *shared), facts("9.0", 1, memory_gib=gib, host_gib=512))
        assert not any(each.short for each in side_by_side.margins), "the engine reserves what both margins leave"
