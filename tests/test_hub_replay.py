"""Batches that are trained on again, and groups consumed in the order of arrival: what the hub's file says of it."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from hub_tools import batch_ids, fill, finish_step, group, ids, in_file, open_store

from astracli.config import recipe_io
from astracli.errors import UserError
from astracli.hub.store import HubStore
from astracli.hub.types import NextBatch
from astracli.rl.schedule import Admission, Replays, replays_due
from astracli.rl.types import unpack_group


def test_replays_due_by_hand() -> None:
    def due(**changes: int) -> int:
        settings = {"ratio": 3, "done": 0, "oldest_version": 5, "max_staleness": 4, "next_step": 6}
        return replays_due(**(settings | changes))

    assert due() == 3  # steps 6, 7, 8; the deadline is step 9
    assert due(done=1, next_step=7) == 2
    assert due(oldest_version=3) == 2  # its deadline is step 7
    assert due(oldest_version=1) == 0


def test_allowance_counts_the_steps_that_replays_take() -> None:
    def batches(staleness: int, replays: Replays, version: int = 10) -> int:
        return Admission(
            batch_groups=1, max_staleness=staleness, next_step=10, version=version, replays=replays,
            steps=100, in_flight=0, waiting=0,
        ).allowed  # fmt: skip

    # staleness 4: steps 10 to 14 are open to a group of version 10
    assert batches(4, Replays()) == 5
    assert batches(4, Replays(1, 0)) == 3  # new ones at 10, 12, 14
    assert batches(4, Replays(1, 1)) == 2  # at 11, 13
    assert batches(4, Replays(2, 2), version=9) == 1  # 10 and 11 are replays, 12 is left, 13 is too late
    assert batches(1, Replays(1, 1), version=9) == 0


def test_the_end_of_a_run_needs_fewer_groups() -> None:
    admission = Admission(
        batch_groups=4, max_staleness=9, steps=15, next_step=10, version=10, in_flight=0, waiting=0,
        replays=Replays(1, 1),
    )  # fmt: skip
    assert admission.needed == 8  # new batches at 11 and 13, replays at 10, 12, 14


def replayed(store: HubStore, step: int) -> int:
    return store.batch(step).batch.replay


def test_every_batch_is_trained_once_more_and_marked(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=3, replay_ratio=1)
    fill(store, 0, 8)
    trained = [finish_step(store, step) for step in range(4)]
    assert trained == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert [replayed(store, step) for step in range(4)] == [0, 1, 0, 1]
    assert store.batch(4).wait.startswith("groups for step 4: 0 of 4")
    counts = store.counts()
    assert (counts.consumed_steps, counts.consumed_groups, counts.replayed_steps) == (4, 8, 2)
    with sqlite3.connect(tmp_path / "hub.sqlite") as file:
        assert file.execute("SELECT DISTINCT replays, step FROM groups ORDER BY step").fetchall() == [(1, 1), (1, 3)]
        assert file.execute("SELECT replay_of FROM batches").fetchall() == [(None,), (0,), (None,), (2,)]


def test_staleness_ends_the_replays_of_a_batch(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=2, replay_ratio=2, batch_groups=2)
    fill(store, 0, 2)
    trained = [finish_step(store, step) for step in range(3)]
    assert trained == [[0, 1]] * 3
    # version 3: group 2 ends in a token of version 2, so that step 5 would be too late for it
    leases = ids(store.lease("w", 2))
    store.put(group(leases[0], 2))
    store.put(group(leases[1], 3))
    assert [finish_step(store, step) for step in (3, 4)] == [[2, 3]] * 2
    assert store.batch(5).wait.startswith("groups for step 5: 0 of 2")


def test_a_replay_gives_way_to_groups_that_would_be_too_old_after_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=2, replay_ratio=2, batch_groups=2)
    leases = ids(store.lease("w", 2))
    for lease in leases:
        store.put(group(lease, 0))
    finish_step(store, 0)
    finish_step(store, 1)
    late = ids(store.lease("w", 2))
    for lease in late:
        store.put(group(lease, 0))  # as if leased at version 0: step 2 is its last
    assert finish_step(store, 2) == late


def test_a_resume_serves_the_same_replays(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=3, replay_ratio=1)
    fill(store, 0, 8)
    before = [finish_step(store, step, checkpoint_step=step + 1) for step in range(3)]
    before.append(batch_ids(store.batch(3)))
    store.close()
    again = open_store(tmp_path, max_staleness=3, replay_ratio=1)
    again.rewind(2, 2)
    assert [batch_ids(again.batch(step)) for step in (2, 3)] == before[2:]
    assert [replayed(again, step) for step in (2, 3)] == [0, 1]
    with sqlite3.connect(tmp_path / "hub.sqlite") as file:
        assert file.execute("SELECT MAX(replays) FROM groups").fetchone() == (1,)


@pytest.mark.parametrize(("ratio", "staleness"), [(1, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("in_order", [True, False])
def test_no_batch_goes_over_its_ratio_and_no_token_over_its_staleness(
    tmp_path: Path, ratio: int, staleness: int, in_order: bool
) -> None:
    """A run with an engine that lags; when its groups end in the order in which they began, none is lost to age."""
    rng = random.Random(1)
    store = open_store(tmp_path, max_staleness=staleness, replay_ratio=ratio, batch_groups=2, steps=24)
    flying: list[tuple[int, int]] = []
    engine = step = 0
    trained: dict[int, list[int]] = {}
    for _ in range(4000):
        if step == 24:
            break
        store.engine_state("engine0", engine, "ready")
        flying += [(lease, engine) for lease in ids(store.lease("w", 3, engine="engine0"))]
        if flying and rng.random() < 0.6:
            lease, version = flying.pop(0 if in_order else rng.randrange(len(flying)))
            rewards = (0.0, 1.0) if rng.random() < 0.7 else (1.0, 1.0)
            store.put(group(lease, version, rewards))
        reply = store.batch(step) if rng.random() < 0.5 else NextBatch(None)
        if reply.batch:
            for blob in reply.batch.groups:
                g = unpack_group(blob)
                assert step - g.oldest_version <= staleness
                trained.setdefault(g.lease_id, []).append(step)
            store.announce(step + 1, step + 1)
            store.ack(step, step + 1)
            step += 1
        if engine < step and rng.random() < 0.5:
            engine = step
    assert step == 24
    times = [len(steps) for steps in trained.values()]
    assert max(times) == 1 + ratio and min(times) >= 1
    assert not (in_order and store.counts().expired)
    assert store.counts().waiting + store.counts().in_flight == len(flying) <= 2 * (staleness + 1)


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("consume", "first", "second"), [("edf", [1, 2], [0, 3]), ("fifo", [3, 2], [0, 1])])
def test_earliest_deadline_or_order_of_arrival(
    tmp_path: Path, consume: str, first: list[int], second: list[int]
) -> None:
    store = open_store(tmp_path, max_staleness=3, batch_groups=2, consume=consume)
    assert ids(store.lease("w", 4)) == [0, 1, 2, 3]
    for lease, version in ((3, 1), (2, 0), (0, 1), (1, 0)):
        store.put(group(lease, version))
    assert finish_step(store, 0) == first
    assert finish_step(store, 1) == second


def test_arrival_order_does_not_wait_for_a_late_group_and_counts_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=1, batch_groups=2, consume="fifo")
    leases = fill(store, 0, 2) + ids(store.lease("w", 2))
    finish_step(store, 0)
    quick = fill(store, 1, 2)
    assert finish_step(store, 1) == quick  # groups 2 and 3, of version 0, are still in flight at their last step
    assert store.put(group(leases[2], 0)) == "stale"
    assert store.counts().expired == 1


def test_a_replay_needs_room_for_its_staleness() -> None:
    assert recipe_io.load("qwen3.5-tiny-m2po-full", ["train.replay_ratio=2"]).train.replay_ratio == 2
    with pytest.raises(UserError, match=r"train\.replay_ratio = 3, but train\.max_staleness lets a token lag"):
        recipe_io.load("qwen3.5-tiny-m2po-full", ["train.replay_ratio=3"])
    with pytest.raises(UserError, match=r"launch\.deterministic lets a token lag at most 0"):
        recipe_io.load("qwen3.5-tiny-m2po-full", ["train.replay_ratio=1", "launch.deterministic=true"])


def test_without_checkpoints_what_will_be_trained_on_again_is_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path, steps=12, max_staleness=4, replay_ratio=1, checkpoints=False)
    for step in range(0, 12, 2):
        fill(store, step)
        assert finish_step(store, step) == finish_step(store, step + 1)
    assert in_file(tmp_path, "SELECT COUNT(*) FROM blobs")[0][0] <= 8
