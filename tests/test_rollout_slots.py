"""An engine's slots while groups wait for their longest samples: refilled at once, within admission, through losses.

The engine's clock is turned by the test: each tick, every running request draws one token. Of four samples about three
have 2 tokens and one has 30, so that nearly every group waits for a long one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rollout_world import World, expected, until

from astracli.rl.types import Group
from astracli.rollout.slot_use import SlotUse

SLOTS, GROUP = 8, 4
ROOM = {"batch_groups": 100, "max_staleness": 0}
"""Admission allows more groups than any test asks for."""


def length(seed: int) -> int:
    return 30 if seed % 4 == 0 else 2


@pytest.mark.parametrize("foreign", [False, True], ids=["one call, answers as they come", "a call for each sample"])
def test_slots_are_filled_again_while_groups_wait_for_their_longest_sample(tmp_path: Path, foreign: bool) -> None:
    stage = tmp_path if foreign else None
    world = World(tmp_path, ROOM, length=length, step_s=0.002, ticks=0, stage_dir=stage)
    running, groups = [], []

    async def scenario() -> None:
        for tick in range(40):
            world.engine.ticks = tick
            await until(lambda: world.engine.ticked and world.engine.running >= SLOTS)
            running.append(world.engine.running)
            groups.append(world.store.counts().in_flight)

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()
    assert running[0] == SLOTS and groups[0] == SLOTS // GROUP
    assert max(running) <= SLOTS + GROUP - 1, "no more than the rest of one group waits in the engine"
    assert max(groups) >= 2 * SLOTS // GROUP, "the law makes groups wait"
    assert world.store.counts().in_flight == 0, "what was not finished went back"
    (worker,) = world.workers
    assert (worker.use.outstanding, worker.use.sent) == (0, 0)


def test_refilling_stays_within_admission(tmp_path: Path) -> None:
    """Staleness 0 and batches of 4 groups: 16 samples in all, never a fifth group for a slot that is free."""
    world = World(tmp_path, {"max_staleness": 0, "drop_equal_groups": False}, length=length, step_s=0.002, ticks=0)
    seen: list[int] = []

    async def scenario() -> None:
        while (counts := world.store.counts()).waiting < 4:
            seen.append(counts.in_flight + counts.waiting)
            world.engine.ticks = len(seen)
            await asyncio.sleep(0.005)
            await until(lambda: world.engine.ticked)
        assert counts.in_flight == world.engine.running == 0

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()
    assert max(seen) == 4


def test_an_engine_that_is_lost_between_the_ends_of_a_group_gives_whole_groups_all_the_same(tmp_path: Path) -> None:
    world = World(tmp_path, {"max_staleness": 9}, length=length, step_s=0.002, ticks=0)
    got: list[Group] = []

    async def scenario() -> None:
        for tick in range(4):
            world.engine.ticks = tick
            await until(lambda: world.engine.ticked and world.engine.running >= SLOTS)
        await asyncio.to_thread(world.engine.stop)
        await until(lambda: world.store.counts().queued)
        (worker,) = world.workers
        await until(lambda: worker.use.outstanding == worker.use.sent == 0)
        world.engine.ticks, world.engine.running = None, 0
        world.engine.start()
        got.extend(await world.batch(0))

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()
    for group in got:
        for sample in group.samples:
            assert sample.tokens.tolist() == expected(group.lease_id, sample.index, length)


def test_time_is_weighted_by_the_share_of_slots_in_use() -> None:
    """4 slots: 2 s empty, 3 s with 2 requests, 5 s with 6 of which 2 wait, 1 s with a sample that is not sent."""
    now = [100.0]
    use = SlotUse(4, lambda: now[0])
    for wait_s, outstanding, sent in ((2.0, 2, 2), (3.0, 4, 4), (5.0, -5, -6)):
        now[0] += wait_s
        use.change(outstanding=outstanding, sent=sent)
    now[0] += 1.0
    assert use.seconds() == (11.0, 2.0, 3.0 * 2 / 4 + 5.0)
    assert (use.outstanding, use.sent) == (1, 0)


@pytest.mark.parametrize("foreign", [False, True], ids=["one call, answers as they come", "a call for each sample"])
def test_rollouts_make_room_for_an_evaluation_and_take_the_slots_back(tmp_path: Path, foreign: bool) -> None:
    world = World(tmp_path, ROOM | {"slots": SLOTS}, length=6, step_s=0.004, stage_dir=tmp_path if foreign else None)
    seen: dict[str, int] = {}

    async def scenario() -> None:
        await until(lambda: world.engine.running >= SLOTS)
        await until(lambda: world.store.slots("engine0", "eval", 100, 0).limit == SLOTS // 2)
        seen["beside it"] = most = 0
        for _ in range(40):
            assert world.store.slots("engine0", "eval", 100, SLOTS // 2).limit == SLOTS // 2
            most = max(most, world.engine.running)
            await asyncio.sleep(0.01)
        seen["beside it"] = most
        world.store.slots("engine0", "eval", 0, 0)
        await until(lambda: world.engine.running >= SLOTS)

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()
    # groups that are one call go out whole: of the last, all but one may wait in the engine
    assert 0 < seen["beside it"] <= SLOTS // 2 + (0 if foreign else GROUP - 1)


def test_what_a_request_spends_outside_the_engine_is_no_busy_slot() -> None:
    """2 slots, 10 s, a request in one of them; the engine ended it after 4."""
    now = [0.0]
    use = SlotUse(2, lambda: now[0])
    use.change(outstanding=1, sent=1)
    now[0] = 10.0
    use.change(outstanding=-1, sent=-1, late_s=6.0)
    assert use.seconds() == (10.0, 0.0, 4.0 / 2) and (use.late_s, use.answers) == (6.0, 1)
