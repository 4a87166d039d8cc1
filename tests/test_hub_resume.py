"""What the hub's file keeps and lets go of, and what survives a kill -9 at any instant."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hub_tools import batch_ids, counts_of, fill, finish_step, group, ids, in_file, open_store

from astracli.errors import RunFailed, UserError
from astracli.hub.types import Target


def test_old_rows_are_deleted_and_still_counted(tmp_path: Path) -> None:
    for name in ("long", "short"):
        (tmp_path / name).mkdir()
    kept = open_store(tmp_path / "long", steps=30, max_staleness=0, history_steps=99)
    short = open_store(tmp_path / "short", steps=30, max_staleness=0, history_steps=5)
    for store in (kept, short):
        for step in range(30):
            a, b, c, d = ids(store.lease("w", 4))
            store.put(group(a, step, rewards=(1.0, 1.0), verdict="timeout"))
            store.skip(b, "prompt of 3000 tokens")
            store.put(group(c, step, verdict="timeout"))
            store.put(group(d, step))
            fill(store, step, 2)
            store.batch(step)
            store.announce(step + 1, step + 1)
            store.ack(step, step + 1, step + 1 if step % 2 else None)
    assert (
        kept.counts()
        == short.counts()
        == counts_of(dropped=30, skipped=30, timeouts=30 * 4, consumed_steps=30, consumed_groups=120)
    )
    rows = [in_file(tmp_path / name, "SELECT COUNT(*) FROM groups")[0][0] for name in ("long", "short")]
    assert rows[0] == 30 * 6 and rows[1] <= 9 * 6, "five steps, and those whose blobs a resume may need"
    ((blobs,),) = in_file(tmp_path / "short", "SELECT COUNT(*) FROM blobs")
    assert blobs <= 4 * 4, "two checkpoints of two steps"
    assert in_file(tmp_path / "short", "SELECT MIN(step) FROM batches")[0][0] >= 20
    with pytest.raises(RunFailed, match="cannot resume from step 3"):
        short.rewind(3, 3)
    short.rewind(28, 28)
    assert len(short.batch(28).batch.groups) == 4


def test_groups_are_kept_back_to_the_checkpoint_before_the_newest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in range(6):
        fill(store, step)
        finish_step(store, step, checkpoint_step={1: 2, 3: 4, 5: 6}.get(step))
    with pytest.raises(RunFailed, match="the groups of step 3 are gone"):
        store.batch(3)
    assert len(store.batch(4).batch.groups) == 4
    with pytest.raises(RunFailed, match="cannot resume from step 2: the groups of 2 later steps are gone"):
        store.rewind(2, 2)
    store.rewind(4, 4)
    assert store.state().counts.consumed_steps == 4


def test_without_checkpoints_a_steps_groups_go_with_the_next_and_a_resume_begins_anew(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 60, "checkpoints": False, "history_steps": 10}
    store = open_store(tmp_path, **settings)
    first = fill(store, 0)
    for step in range(40):
        finish_step(store, step)
        assert in_file(tmp_path, "SELECT COUNT(*) FROM blobs")[0][0] <= 2 * 4, "this step's, and the one to be pruned"
        fill(store, step + 1)
    assert store.state().counts.consumed_steps == 40
    assert in_file(tmp_path, "SELECT COUNT(*) FROM groups")[0][0] <= 13 * 4
    store.close()

    store = open_store(tmp_path, **settings)
    store.rewind(0, 0)
    assert store.counts() == counts_of() and store.state().next_step == 0
    store.announce(0, 0)
    store.engine_state("engine0", 0, "ready")
    assert fill(store, 0) == first, "the run from its first prompt"
    assert finish_step(store, 0) == first
    store.close()
    store = open_store(tmp_path, **settings)
    store.rewind(0, 0)  # nothing had gone yet: the same groups again
    assert batch_ids(store.batch(0)) == first


def test_a_checkpoint_of_before_is_still_resumed_from_when_later_ones_are_switched_off(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in range(4):
        fill(store, step)
        finish_step(store, step, checkpoint_step=step + 1 if step % 2 else None)
    store.close()
    store = open_store(tmp_path, checkpoints=False)
    store.rewind(4, 4)
    store.announce(4, 4)
    store.engine_state("engine0", 4, "ready")
    batches = []
    for step in range(4, 8):
        fill(store, step)
        batches.append(finish_step(store, step))
    store.rewind(4, 4)
    assert [batch_ids(store.batch(step)) for step in range(4, 8)] == batches


def test_rewind_serves_the_same_batches_again_and_forgets_what_came_later(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=2)
    store.announce(0, 0)
    store.engine_state("engine0", 0, "ready")
    store.eval_done(0, 0, {"overall": 0.4})
    batches = []
    for step in range(5):
        fill(store, step)
        batches.append(finish_step(store, step))
    in_flight = ids(store.lease("w", 2))
    evals = [(e.due_step, e.step, e.state) for e in store.state().evals]
    assert evals == [(0, 0, "done"), (2, 2, "running"), (4, None, "waiting")]
    store.close()

    store = open_store(tmp_path, eval_every=2)
    store.rewind(3, 3)
    state = store.state()
    assert state.latest_version is None, "nothing may be fetched before the trainer has published version 3 anew"
    assert store.target("engine0") == Target(None, False, False, False, False)
    assert [(e.step, e.state) for e in state.evals] == [(0, "done"), (2, "running")]
    assert (state.counts.consumed_steps, state.next_step, state.counts.queued) == (3, 5, 2)
    assert store.announce(3, 3) == [2]
    assert store.target("engine0") == Target(2, True, False, False, False)
    store.engine_state("engine0", 3, "ready")
    assert store.lease("w", 9, engine="engine0").leases == [], "two batches are there already"
    assert [finish_step(store, step) for step in (3, 4)] == batches[3:]
    assert ids(store.lease("w", 2)) == in_flight
    assert not store.finished


def test_another_schema_and_another_file_are_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / "hub.sqlite") as file:
        file.execute("UPDATE meta SET value = 7 WHERE key = 'schema_version'")
    with pytest.raises(UserError, match="has schema 7, this astra reads 6"):
        open_store(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "hub.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="is not a hub database"):
        open_store(tmp_path / "other")


def test_reopening_requeues_leases_and_keeps_everything_else(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 0, n=5)
    first = store.batch(0)
    store.lease("w", 2)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tmp_path.glob("hub.sqlite*"):
        shutil.copy(file, copy)
    again = open_store(copy)
    assert again.batch(0) == first
    counts = again.counts()
    assert (counts.in_flight, counts.queued, counts.waiting) == (0, 2, 1)
    assert ids(again.lease("w", 2)) == [5, 6]


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from hub_tools import group, ids, open_store, batch_ids, finish_step

store = open_store(Path({path!r}), steps=10**6, batch_groups=3, drop_equal_groups=True)
print("open", flush=True)
step = store.state().counts.consumed_steps
while True:
    for lease in ids(store.lease("w", 3)):
        version = store.target("engine0").version or 0
        blob = group(lease, version, rewards=(1.0, 1.0) if lease % 5 == 4 else (0.0, 1.0))
        print("put", lease, store.put(blob), flush=True)
    reply = store.batch(step)
    if reply.batch:
        print("batch", step, *batch_ids(reply), flush=True)
        store.announce(step + 1, step + 1)
        store.ack(step, step + 1, (step + 1) if step % 4 == 3 else None)
        print("ack", step, flush=True)
        step += 1
"""


def test_kill_9_at_any_instant_loses_no_group_and_serves_none_in_two_batches(tmp_path: Path) -> None:
    """A hub does its work as fast as it can; it is killed 8 times; everything it ever said must still hold."""
    source = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), path=str(tmp_path))
    moments = random.Random(7)
    batches: dict[int, list[int]] = {}
    settled: dict[int, str] = {}
    acked = -1
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        said = [child.stdout.readline().strip() for _ in range(moments.randint(20, 80))]
        time.sleep(moments.uniform(0, 0.005))
        os.kill(child.pid, signal.SIGKILL)
        said += child.stdout.read().split("\n")[:-1]  # without a torn last line
        child.wait()
        for line in said:
            words = line.split()
            if words[0] == "put" and words[2] in ("accepted", "dropped"):
                assert int(words[1]) not in settled, "settled once"
                settled[int(words[1])] = words[2]
            elif words[0] == "batch" and len(words) == 5:
                assert batches.setdefault(int(words[1]), [int(i) for i in words[2:]]) == [int(i) for i in words[2:]]
            elif words[0] == "ack":
                acked = max(acked, int(words[1]))
    assert len(batches) > 20
    served = [i for step in batches.values() for i in step]
    assert len(served) == len(set(served)), "no group in two batches"

    with sqlite3.connect(tmp_path / "hub.sqlite") as file:
        state = dict(file.execute("SELECT lease_id, state FROM groups"))
        rows = dict(file.execute("SELECT lease_id, step FROM groups WHERE state = 'assigned'"))
        blobs = {row[0] for row in file.execute("SELECT lease_id FROM blobs")}
        done = file.execute("SELECT COUNT(*) FROM batches WHERE acked = 1").fetchone()[0]
    assert done > acked, "an acknowledgement that was answered stays"
    assert sorted(state) == list(range(len(state))), "no lease is missing"
    for lease, status in settled.items():
        assert state[lease] in (("kept", "assigned") if status == "accepted" else ("dropped",))
    assert all(rows[i] == step for step, members in batches.items() for i in members)
    assert all(lease in blobs for lease, name in state.items() if name == "kept")


def test_an_evaluation_of_forgotten_weights_is_due_again_and_takes_the_version_that_is_resumed(tmp_path: Path) -> None:
    store = open_store(tmp_path, eval_every=2)
    for version in range(4):
        store.announce(version, version)
    store.eval_done(0, 0, {})
    store.announce(4, 4)
    store.eval_done(3, 3, {})  # due at 2
    assert store.eval_next().wait.startswith("an engine to hold version 4")
    with sqlite3.connect(tmp_path / "hub.sqlite") as file:
        file.execute("INSERT INTO batches (step, lease_ids, stats) VALUES (3, '[]', '{}')")
    store.rewind(2, 2)
    evals = [(e.due_step, e.step, e.state) for e in store.state().evals]
    assert evals == [(0, 0, "done"), (2, None, "waiting")]
    assert store.announce(2, 2) == [2]
    assert [(e.due_step, e.step, e.state) for e in store.state().evals][1:] == [(2, 2, "running")]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """The database knows the checkpoints that were made beside it; one that is made again replaces the older one."""
    made = {2: 7, 4: 8}
    store = open_store(tmp_path, own_batches=True, steps=9, checkpoint=made.get)
    for step in range(5):
        store.batch(step)
        store.ack(step, step + 1, checkpoint_step=step if step in made else None)
    made[2] = 9
    with pytest.raises(RunFailed, match=r"hub.sqlite and the checkpoint of step 2 are of two runs"):
        store.rewind(2, 2)
    made[2] = 7
    store.rewind(2, 2)
    made[4] = 10  # made again, and the run was killed before it told the hub
    store.rewind(4, 4)
    made.clear()
    store.rewind(2, 2)
