"""Where a full version waits for its pause: GPU memory, pinned host memory, its file; and what the engine is told."""

from __future__ import annotations

import configs
import pytest
from machines import GIB, facts
from test_plan import TINY, load, planned, tiny

from astracli.machine.memory import MemoryRow
from astracli.plan import build as plan
from astracli.plan import memory as plan_memory
from astracli.plan.types import LaunchPlan
from astracli.plan.view import what

FULL, DELTA = "qwen3.5-4b-m2po-full", "qwen3.5-4b-m2po-delta"
ONE_GPU = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")
SIZE = 2 * 4_205_751_296


def waiting(result: LaunchPlan) -> list[MemoryRow]:
    return [row for row in result.memory if what(row) == "a full version before its pause"]


def reason(result: LaunchPlan) -> tuple[str, str]:
    (found,) = [(where, why) for what, where, why in result.placement.reasons if what == "a full version"]
    return found


@pytest.mark.parametrize("name", [FULL, DELTA])
def test_engines_of_their_own_gpu_stage_on_it_and_are_told(name: str) -> None:
    result = planned(load(name), facts("8.9", 8, host_gib=512))
    assert [(row.process, row.where, row.bytes, row.away) for row in waiting(result)] == [
        (f"engine{k}", "gpu", SIZE, False) for k in range(4)
    ]
    assert reason(result) == ("gpu", "before its pause: room for 7.83 GiB more")
    assert configs.of_plan(load(FULL), result)["engine2"].staging == result.placement.staging == "gpu"


def test_a_full_gpu_leaves_the_host_and_a_full_host_the_file() -> None:
    """The same engine on GPUs around the size from which there is room: all rows within 95 % of it."""
    limit = None
    for gib in range(20, 45):
        result = planned(load(FULL), facts("8.9", 8, memory_gib=gib, host_gib=512))
        used = plan_memory.on_gpu([row for row in result.memory if row not in waiting(result)], ["engine0"])
        assert (reason(result)[0] == "gpu") == (used + SIZE <= 0.95 * gib * GIB)
        limit = limit or (gib if reason(result)[0] == "gpu" else None)
    assert limit is not None and 20 < limit < 44, "both happen"
    small = planned(load(FULL), facts("8.9", 8, memory_gib=limit - 1, host_gib=512))
    assert reason(small) == ("host", "before its pause: no GPU memory for 7.83 GiB more; pinned")
    assert {row.where for row in waiting(small)} == {"host"} and len(waiting(small)) == 4
    host = plan_memory.total(small.memory, where="host")
    exact = planned(load(FULL), facts("8.9", 8, memory_gib=limit - 1, host_gib=host / GIB))
    assert reason(exact)[0] == "host"
    less = planned(load(FULL), facts("8.9", 8, memory_gib=limit - 1, host_gib=(host - GIB) / GIB))
    plan.refuse(less)
    assert not waiting(less) and reason(less)[0] == "file" and reason(less)[1].endswith("copied in the pause")


def test_beside_a_trainer_only_runs_that_need_it_often_spend_gpu_memory() -> None:
    wide, few = facts("9.0", 1, memory_gib=192, host_gib=512), (*ONE_GPU, "rollout.max_running_requests=32")
    assert reason(planned(load(FULL, *few), wide))[0] == "gpu"
    deltas = reason(planned(load(DELTA, *few), wide))
    assert deltas == ("host", "before its pause: deltas seldom need it beside a trainer; pinned")


def test_with_time_sharing_the_version_leaves_the_gpu_with_its_engine() -> None:
    result = planned(
        load(FULL, *ONE_GPU, "resources.share_mode=time_sharing"), facts("9.0", 1, memory_gib=141, host_gib=512)
    )
    assert [(row.where, row.away) for row in waiting(result)] == [("gpu", True)]


def test_an_engine_on_the_host_holds_it_there_and_one_that_nobody_publishes_to_holds_none() -> None:
    result = planned(tiny(), facts(), TINY)
    assert [row.where for row in waiting(result)] == ["host"] and result.placement.reasons == ()
    assert not waiting(planned(load(DELTA), facts("8.9", 8, host_gib=512), command="rollout"))
