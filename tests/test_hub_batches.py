"""The hub's store: batches, versions and evaluations."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hub_tools import batch_ids, fill, finish_step, group, ids, open_store

from astracli.errors import RunFailed
from astracli.hub.store import HubStore
from astracli.hub.types import BatchStats, Evaluation, Holders, Leases, NextBatch, NextEvaluation

# ---- batches ---------------------------------------------------------------------------------------------------------


def test_batches_take_the_earliest_deadline_then_the_lowest_lease(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=3)
    leases = ids(store.lease("w", 8))
    versions = {0: 2, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 6: 0, 7: 2}
    for lease in reversed(leases):
        store.put(group(lease, versions[lease]))
    assert batch_ids(store.batch(0)) == [3, 6, 1, 4]
    assert batch_ids(store.batch(1)) == [0, 2, 5, 7]


def test_the_same_step_serves_the_same_groups_and_steps_come_in_order(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 0, n=8)
    first = store.batch(0)
    assert store.batch(0) == first
    with pytest.raises(RunFailed, match="batch 2 was asked for; the next one is 1 of 10"):
        store.batch(2)
    with pytest.raises(RunFailed, match="step 1 was acknowledged, but has no batch"):
        store.ack(1, 2)


def test_groups_too_old_are_discarded_counted_and_never_served(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=1)
    ids(store.lease("w", 8))
    for lease in range(7):
        store.put(group(lease, 0))
    assert finish_step(store, 0) == [0, 1, 2, 3]
    store.lease("w", 1)
    store.put(group(8, 1))
    store.give_back([7])
    assert finish_step(store, 1) == [4, 5, 6, 8]
    assert store.lease("w", 4).leases[0].lease_id == 7
    assert store.put(group(7, 0)) == "stale"
    for lease in (9, 10, 11):
        store.put(group(lease, 1))
    assert store.batch(2).wait == "groups for step 2: 3 of 4, 0 in flight"
    assert store.state().counts.expired == 1


def test_kept_groups_expire_when_their_deadline_passes(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=2, batch_groups=1)
    store.lease("w", 3)
    for lease, version in ((0, 0), (1, 0), (2, 0)):
        store.put(group(lease, version))
    assert [finish_step(store, s) for s in range(3)] == [[0], [1], [2]]
    store.lease("w", 2)
    store.put(group(3, 3))
    store.put(group(4, 1))  # due in step 3, served before the younger lease 3
    assert finish_step(store, 3) == [4]
    assert finish_step(store, 4) == [3]


def test_a_batch_waits_for_a_group_in_flight_that_no_later_step_could_take(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_staleness=1)
    store.engine_state("engine0", 0, "ready")
    store.lease("w", 8, engine="engine0")
    for lease in range(4):
        store.put(group(lease, 0))
    finish_step(store, 0)
    assert ids(store.lease("w", 8, engine="engine0")) == [8, 9, 10, 11]
    for lease in (4, 5, 6, 8, 9, 10):
        store.put(group(lease, 0 if lease < 8 else 1))
    assert store.batch(1) == NextBatch(None, "1 group in flight that step 1 must take or none can")
    store.put(group(7, 0))
    assert finish_step(store, 1) == [4, 5, 6, 7]
    assert store.state().counts.expired == 0


def test_stats_of_a_batch_count_everything_that_came_in(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.lease("w", 6)
    for lease in range(4):
        store.put(group(lease, rewards=(0.0, 1.0)))
    store.put(group(4, rewards=(1.0, 1.0)))
    store.put(group(5, rewards=(0.0, 0.0), verdict="timeout"))
    assert store.batch(0).batch.stats == BatchStats(
        arrived_groups=6,
        dropped_groups=2,
        expired_groups=0,
        reward_mean=0.5,
        tokens=36,
        samples=12,
        timeouts=2,
        reward_errors=0,
        parts={},
    )
    for lease in ids(store.lease("w", 4)):
        store.put(group(lease))
    assert store.batch(1).batch.stats.arrived_groups == 4


def test_a_batch_for_which_nothing_came_in_has_no_mean_reward(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 0, n=8)
    assert store.batch(0).batch.stats.arrived_groups == 8
    stats = store.batch(1).batch.stats
    assert (stats.arrived_groups, stats.reward_mean) == (0, None)


# ---- versions and evaluations ----------------------------------------------------------------------------------------


TWO = ["engine0", "engine1"]


def targets(store: HubStore) -> list[tuple[int | None, bool]]:
    return [(store.target(name).version, store.target(name).pinned) for name in TWO]


def test_every_engine_serves_an_evaluation_and_is_let_go_when_its_share_is_served(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=2, engines=TWO, steps=5)
    assert targets(store) == [(None, False)] * 2
    assert store.announce(0, 0) == [0]
    assert store.announce(0, 0) == [0]
    assert store.announce(1, 1) == [0]
    assert targets(store) == [(0, True)] * 2
    assert store.eval_next().wait == "an engine to hold version 0: engine0 is starting, engine1 is starting"
    store.engine_state("engine1", 0, "ready")
    assert store.eval_next() == NextEvaluation(Evaluation(0, 0, 0, False), None, False)
    assert store.eval_engines(0) == Holders(["engine1"], False)
    assert store.eval_engines(1) == Holders([], False), "not what is evaluated"
    store.engine_state("engine0", 0, "ready")
    store.eval_release(0, 0, "engine1")
    assert targets(store) == [(0, True), (1, False)]
    assert store.eval_engines(0).engines == ["engine0"], "the other is about to be updated"
    store.eval_release(0, 0, "engine0")
    assert targets(store) == [(1, False)] * 2, "its results may come later"
    assert store.eval_next() == NextEvaluation(Evaluation(0, 0, 0, True), None, False), "of a worker that was killed"
    assert store.eval_next([0]).wait == "the next version to evaluate; the latest is 1"
    assert store.announce(1, 1) == [0], "a resume may need it"
    store.eval_done(0, 0, {"overall": 0.3})
    assert store.announce(1, 1) == []
    assert store.eval_next().wait == "the next version to evaluate; the latest is 1"
    with pytest.raises(RunFailed, match="no evaluation of version 7 at step 1"):
        store.eval_done(1, 7, {})


def test_an_evaluation_that_becomes_due_meanwhile_takes_the_version_that_is_current_then(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=2, engines=TWO, steps=9)
    for version in range(4):
        reply = store.announce(version, version)
    assert reply == [0, 3], "the latest may be taken before the trainer publishes another"
    assert targets(store) == [(0, True)] * 2, "one at a time"
    store.announce(4, 4)
    store.announce(5, 5)
    assert [(e.due_step, e.step, e.state) for e in store.state().evals] == [
        (0, 0, "running"),
        (2, None, "waiting"),
    ], "one evaluation stands for all that became due"
    store.eval_release(0, 0, "engine0")
    store.engine_state("engine0", 5, "ready")
    store.engine_state("engine1", 0, "ready")
    store.eval_release(0, 0, "engine1")
    assert store.eval_next([0]) == NextEvaluation(Evaluation(5, 5, 2, False), None, False)
    store.eval_done(0, 0, {})
    assert targets(store) == [(5, True)] * 2
    assert store.eval_engines(5).engines == ["engine0"]
    store.eval_done(0, 0, {"again": 1})
    assert store.eval_next().evaluation.step == 5, "told twice"
    assert store.announce(6, 6) == [5, 6]
    store.eval_done(5, 5, {})
    assert store.announce(6, 6) == [6]
    assert (store.pending_evals(), store.state().evals[-1].due_step) == (1, 6)
    store.eval_done(6, 6, {})
    store.eval_release(6, 6, "engine0")
    for version in (7, 8, 9):
        store.announce(version, version)
    store.eval_done(8, 8, {})
    assert [(e.due_step, e.step) for e in store.state().evals] == [(0, 0), (2, 5), (6, 6), (8, 8), (9, 9)]


def test_an_engine_that_is_lost_in_its_share_gets_the_evaluated_version_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=9, engines=TWO)
    store.announce(0, 0)
    for name in TWO:
        store.engine_state(name, 0, "ready")
    store.announce(1, 1)
    store.eval_release(0, 0, "engine0")
    store.release_worker("engine1")
    assert store.eval_engines(0).engines == []
    assert targets(store) == [(1, False), (0, True)]
    store.release_worker("engine0")
    assert targets(store)[0] == (1, False), "its share is served"
    store.engine_state("engine1", 0, "ready")
    assert store.eval_engines(0).engines == ["engine1"]


def test_deterministic_engines_stay_together_until_an_evaluation_is_done(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=1, engines=TWO, max_staleness=0, deterministic=True)
    store.announce(0, 0)
    store.eval_release(0, 0, "engine0")
    store.announce(1, 1)
    assert targets(store) == [(0, True)] * 2, "so that version 2 cannot be made before version 1 is evaluated"
    store.eval_done(0, 0, {})
    assert targets(store) == [(1, True)] * 2 and store.state().evals[-1].due_step == 1


def test_the_last_step_is_evaluated_and_then_the_run_is_finished(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=100, steps=1)
    store.announce(0, 0)
    store.eval_done(0, 0, {})
    fill(store, 0)
    finish_step(store, 0)
    assert not store.finished
    assert store.eval_next() == NextEvaluation(Evaluation(1, 1, 1, False), None, False)
    store.eval_done(1, 1, {"overall": 0.9})
    assert store.finished
    assert store.eval_next().stop
    assert store.state().evals[-1].results == {"overall": 0.9}


def test_request_stop_reaches_every_worker(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    heard: list[int] = []
    store.subscribe(lambda: heard.append(1))
    store.request_stop()
    assert heard
    assert store.lease("w", 1) == Leases([], "the end: the run is being stopped", True)
    assert store.target("engine0").stop
    assert store.eval_next().stop


def test_threads_share_one_store(tmp_path: Path) -> None:
    store = open_store(tmp_path, batch_groups=5, max_staleness=2, steps=40)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            while not stop.is_set():
                for lease in ids(store.lease(name, 3)):
                    store.put(group(lease, store.target("engine0").version or 0))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    served: list[int] = []
    end = time.monotonic() + 30
    while len(served) < 200 and time.monotonic() < end and not failures:
        step = len(served) // 5
        if store.batch(step).batch:
            served += finish_step(store, step)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert (len(served), len(set(served))) == (200, 200)
    assert store.finished
