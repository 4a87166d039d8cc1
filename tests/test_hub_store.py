"""The hub's store: admission and leases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_tools import Clock, batch_ids, counts_of, fill, group, ids, open_store

from astracli.hub.types import Leases

# ---- admission -------------------------------------------------------------------------------------------------------


def test_leases_stop_at_what_staleness_allows_and_say_why(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert ids(store.lease("w", 100)) == list(range(8))
    reply = store.lease("w", 1)
    assert reply == Leases([], "training: 8 groups in flight, 0 waiting of 8 allowed (staleness 1)", False)


def test_staleness_0_grants_nothing_while_the_trainer_works(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=0, deterministic=True)
    store.engine_state("engine0", 0, "ready")
    for lease in reversed(ids(store.lease("w", 9, engine="engine0"))):
        store.put(group(lease))
    assert batch_ids(store.batch(0)) == [0, 1, 2, 3]
    assert store.lease("w", 9, engine="engine0").leases == []
    store.announce(1, 1)
    assert store.lease("w", 9, engine="engine0").leases == [], "announced, but the engine does not hold it yet"
    store.engine_state("engine0", 1, "ready")
    assert ids(store.lease("w", 9, engine="engine0")) == [4, 5, 6, 7]


def test_deterministic_leases_come_in_waves_that_do_not_depend_on_who_was_quick(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=0, deterministic=True)
    store.engine_state("engine0", 0, "ready")
    assert ids(store.lease("w", 3, engine="engine0")) == [0, 1, 2]
    assert ids(store.lease("w", 3, engine="engine0")) == [3], "what is left of the wave"
    for lease in (2, 0):
        store.put(group(lease, rewards=(1.0, 1.0)))
    reply = store.lease("w", 3, engine="engine0")
    assert reply.leases == [] and reply.wait == "2 groups in flight: one wave at a time"
    for lease in (1, 3):
        store.put(group(lease))
    assert ids(store.lease("w", 3, engine="engine0")) == [4, 5], "two were dropped: the next wave has two"


def test_a_resumed_deterministic_run_begins_its_wave_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=0, deterministic=True)
    store.engine_state("engine0", 0, "ready")
    fill(store, 0)
    assert batch_ids(store.batch(0)) == [0, 1, 2, 3]
    store.ack(0, 1, 1)
    store.engine_state("engine0", 1, "ready")
    assert ids(store.lease("w", 9, engine="engine0")) == [4, 5, 6, 7]
    store.put(group(4, 1))
    store.put(group(5, 1, rewards=(1.0, 1.0)))
    store.close()
    store = open_store(tmp_path, max_staleness=0, deterministic=True)
    store.rewind(1, 1)
    assert store.state().counts == counts_of(consumed_steps=1, consumed_groups=4)
    store.engine_state("engine0", 1, "ready")
    assert ids(store.lease("w", 9, engine="engine0")) == [4, 5, 6, 7]
    assert [store.put(group(lease, 1)) for lease in (4, 5, 6, 7)] == ["accepted"] * 4
    assert batch_ids(store.batch(1)) == [4, 5, 6, 7]


def test_an_engine_that_is_not_ready_gets_no_leases(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.lease("w", 1, engine="engine0").wait == "engine0, which is starting"
    store.engine_state("engine0", None, "down")
    assert store.lease("w", 1, engine="engine0").wait == "engine0, which is down"


@pytest.mark.parametrize("rewards", [(0.0, 0.0), (1.0, 1.0), None])
def test_a_run_has_no_signal_after_so_many_batches(tmp_path: Path, rewards: Any) -> None:
    store = open_store(tmp_path, max_dropped_batches=3)

    def drop(count: int) -> None:
        for _ in range(count):
            (lease,) = ids(store.lease("w", 1))
            earned = rewards or (lease % 2, lease % 2)
            assert store.put(group(lease, rewards=earned, verdict="no_answer", finish="length")) == "dropped"

    drop(11)
    (kept,) = ids(store.lease("w", 1))
    assert store.put(group(kept)) == "accepted"
    drop(11)
    assert "11 in a row dropped for no signal" in store.batch(0).wait, "a group with signal counts from 0 again"
    assert store.no_signal is None
    drop(1)
    assert store.no_signal is None, "the trainer has not asked again"
    assert store.batch(0).batch is None
    seen = store.no_signal
    assert seen is not None and (seen.groups, seen.batches, seen.samples, seen.rewards) == (12, 3, 24, [])
    assert (seen.truncated, seen.no_answer, seen.errors, seen.timeouts) == (24, 24, 0, 0)
    assert (seen.lowest, seen.highest) == ((0, 1) if rewards is None else (rewards[0], rewards[0]))
    assert sorted(seen.prompts) == list(range(12, 24)), "the newest"
    store.rewind(0, 0)
    assert store.no_signal is None
    assert store.batch(0).wait, "a resumed run counts anew"
    (tmp_path / "endless").mkdir()
    endless = open_store(tmp_path / "endless", max_dropped_batches=0)
    for _ in range(40):
        (lease,) = ids(endless.lease("w", 1))
        endless.put(group(lease, rewards=(0.0, 0.0)))
    assert "40 in a row" in endless.batch(0).wait


def test_groups_that_are_there_are_trained_on_whatever_was_dropped_since(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_dropped_batches=1)
    fill(store, 0)
    for lease in ids(store.lease("w", 4)):
        store.put(group(lease, rewards=(0.0, 0.0)))
    assert store.state().dropped_in_a_row == 4
    assert len(store.batch(0).batch.groups) == 4


def test_dropped_groups_free_their_capacity_and_are_counted(tmp_path: Path) -> None:
    store = open_store(tmp_path, steps=1)
    seen = 0
    for _ in range(10):
        leases = ids(store.lease("w", 100))
        assert len(leases) == 4, "dropped groups are replaced even when the run needs only four more"
        for lease in leases:
            assert store.put(group(lease, rewards=(1.0, 1.0))) == "dropped"
        seen += 4
    state = store.state()
    assert (state.dropped_in_a_row, state.counts.dropped) == (seen, seen)
    assert "40 in a row dropped for no signal" in store.batch(0).wait
    fill(store, 0, n=1)
    assert store.state().dropped_in_a_row == 0


def test_equal_rewards_are_kept_when_the_recipe_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path, drop_equal_groups=False)
    (lease,) = ids(store.lease("w", 1))
    assert store.put(group(lease, rewards=(1.0, 1.0))) == "accepted"


def test_the_end_of_the_run_grants_what_is_needed_and_no_more(tmp_path: Path) -> None:
    store = open_store(tmp_path, steps=1, max_staleness=8)
    leases = ids(store.lease("w", 100))
    assert len(leases) == 4
    store.put(group(leases[0], rewards=(0.0, 0.0)))
    store.skip(leases[1], "prompt of 3000 tokens")
    assert ids(store.lease("w", 100)) == [4, 5]
    for lease in (2, 3, 4, 5):
        store.put(group(lease))
    assert store.lease("w", 1).wait == "the run's last 4 groups: 0 in flight, 4 waiting"
    assert batch_ids(store.batch(0)) == [2, 3, 4, 5]
    assert store.lease("w", 1).wait == "the end of the run: every batch has its groups"
    assert store.state().counts.skipped == 1


# ---- leases ----------------------------------------------------------------------------------------------------------


def test_expired_and_returned_leases_are_granted_again_first(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    assert ids(store.lease("a", 3)) == [0, 1, 2]
    clock.now += 50
    assert store.renew([1], "a") == []
    assert store.renew([1], "b") == [1]
    clock.now += 20
    assert store.renew([0, 1, 2], "a") == [0, 2]
    assert ids(store.lease("b", 3)) == [0, 2, 3]
    store.give_back([2])
    assert store.release_worker("a") == 1
    assert ids(store.lease("c", 3)) == [1, 2, 4]


def test_the_first_arrival_of_a_lease_wins_even_after_it_was_granted_again(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    store.lease("slow", 1)
    clock.now += 61
    assert ids(store.lease("fast", 1)) == [0]
    first, second = group(0, rewards=(0.0, 1.0)), group(0, rewards=(1.0, 0.0))
    assert [store.put(first), store.put(second)] == ["accepted", "duplicate"]
    assert store.put(group(99)) == "unknown_lease"
    fill(store, 0, n=3)
    assert store.batch(0).batch.groups[0] == first


def test_a_group_of_an_expired_lease_in_the_queue_is_taken_and_not_granted_again(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    store.lease("slow", 1)
    clock.now += 61
    assert store.put(group(0)) == "accepted"
    assert ids(store.lease("fast", 1)) == [1]


def test_a_lost_lease_reply_is_repeated_not_granted_twice(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert ids(store.lease("w", 3, request="r1")) == ids(store.lease("w", 3, request="r1")) == [0, 1, 2]
    assert ids(store.lease("w", 3, request="r2")) == [3, 4, 5]


def test_what_is_no_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a packed group"):
        open_store(tmp_path).put(b"\x00nonsense")
