"""Batches: which groups a step trains on, fixed before anyone is told, and what is known to be consumed."""

from __future__ import annotations

import json
from typing import Any

from astracli.errors import RunFailed
from astracli.hub.schema import Database
from astracli.rl.schedule import batch_reason, count

PRUNED_AT_ONCE = 2
"""Steps; one is made at each acknowledgement, so two keep up."""


class BatchBook:
    """Part of the store, which holds the database's lock around every call."""

    def __init__(
        self,
        database: Database,
        *,
        batch_groups: int,
        max_staleness: int,
        steps: int,
        deterministic: bool,
        history_steps: int,
    ):
        self._db = database
        self._size = batch_groups
        self._max_staleness = max_staleness
        self._steps = steps
        self._by_id = deterministic
        self._history = history_steps

    @property
    def next_step(self) -> int:
        """The next step without a batch."""
        return self._db.scalar("SELECT COALESCE(MAX(step) + 1, 0) FROM batches")

    @property
    def acked(self) -> int:
        """Steps whose batch has been consumed."""
        kept = self._db.scalar("SELECT COUNT(*) FROM batches WHERE acked = 1")
        return kept + self.forgotten("steps")

    def forgotten(self, what: str) -> int:
        """Rows that retention has deleted: `steps`, groups by state, and `timeouts` among their samples."""
        return self._db.meta(f"forgotten_{what}")

    def serve(self, step: int) -> dict[str, Any]:
        """The groups of `step`, always the same ones, or {"wait": reason}. Raises RunFailed for a step out of order."""
        row = self._db.one("SELECT lease_ids, stats, pruned FROM batches WHERE step = ?", step)
        if row is None:
            wait = self._assign(step)
            if wait is not None:
                return {"wait": wait}
            return self.serve(step)
        if row[2]:
            raise RunFailed(f"the groups of step {step} are gone: two later checkpoints have been acknowledged")
        ids = json.loads(row[0])
        marks = ",".join("?" * len(ids))
        blobs = dict(self._db.rows(f"SELECT lease_id, blob FROM blobs WHERE lease_id IN ({marks})", *ids))
        return {"step": step, "groups": [blobs[i] for i in ids], "stats": json.loads(row[1])}

    def _assign(self, step: int) -> str | None:
        """Fix the groups of the next step. -> None, or what it waits for.

        Earliest deadline first, then lease id. A group in flight whose deadline is this very step is waited for:
        otherwise long completions would be thrown away, and the policy would learn from short ones only.
        """
        if step != self.next_step or step >= self._steps:
            raise RunFailed(f"batch {step} was asked for; the next one is {self.next_step} of {self._steps}")
        oldest = step - self._max_staleness
        self._discard_older(oldest)
        kept = self._db.rows(
            "SELECT lease_id FROM groups WHERE state = 'kept' ORDER BY version, lease_id LIMIT ?", self._size
        )
        due = self._db.scalar("SELECT COUNT(*) FROM groups WHERE state = 'leased' AND version = ?", oldest)
        if len(kept) < self._size or due:
            return batch_reason(
                step=step,
                ready=len(kept),
                batch_groups=self._size,
                in_flight=self._db.scalar("SELECT COUNT(*) FROM groups WHERE state = 'leased'"),
                due=due,
                dropped_in_a_row=self._db.meta("dropped_in_a_row"),
            )
        ids = [int(row[0]) for row in kept]
        if self._by_id:
            ids.sort()
        with self._db.transaction() as sql:
            sql.executemany(
                "UPDATE groups SET state = 'assigned', step = ? WHERE lease_id = ?", [(step, i) for i in ids]
            )
            sql.execute(
                "INSERT INTO batches (step, lease_ids, stats) VALUES (?, ?, ?)",
                (step, json.dumps(ids), json.dumps(self._stats(step))),
            )
        return None

    def _discard_older(self, oldest: int) -> None:
        late = self._db.rows("SELECT lease_id FROM groups WHERE state = 'kept' AND version < ?", oldest)
        if late:
            with self._db.transaction() as sql:
                sql.executemany("UPDATE groups SET state = 'expired' WHERE lease_id = ?", late)
                sql.executemany("DELETE FROM blobs WHERE lease_id = ?", late)

    def _stats(self, step: int) -> dict[str, Any]:
        row = self._db.one(
            "SELECT COUNT(*), SUM(state = 'dropped'), SUM(state = 'expired'), AVG(reward_mean), SUM(tokens), "
            "SUM(samples), SUM(timeouts) FROM groups WHERE arrived = ?",
            step,
        )
        assert row is not None
        names = ("arrived_groups", "dropped_groups", "expired_groups", "reward_mean", "tokens", "samples", "timeouts")
        stats = {name: value or 0 for name, value in zip(names, row, strict=True)}
        if not stats["arrived_groups"]:
            del stats["reward_mean"]
        return stats

    def ack(self, step: int, version: int, checkpoint_step: int | None) -> None:
        """The batch of `step` has become `version`. Twice is once. Raises RunFailed for a step without a batch.

        `checkpoint_step` c: a checkpoint that has trained steps < c is on disk. Groups are kept back to the checkpoint
        before it, so that either can be resumed from.
        """
        with self._db.transaction() as sql:
            change = sql.execute("UPDATE batches SET acked = 1, version = ? WHERE step = ?", (version, step))
            if not change.rowcount:
                raise RunFailed(f"step {step} was acknowledged, but has no batch; the next one is {self.next_step}")
            before = self._db.meta("checkpoint_step")
            if checkpoint_step is not None and checkpoint_step > before:
                self._db.set_meta("checkpoint_step", checkpoint_step)
                self._db.set_meta("prunable_before", before)
            self._prune()

    def _prune(self) -> None:
        """Inside a transaction: delete what the oldest steps were trained on, and rows that are history.

        A few steps at each acknowledgement: everyone waits while hundreds of megabytes are freed at once.
        """
        done = self._db.rows(
            "SELECT step, lease_ids FROM batches WHERE pruned = 0 AND step < ? ORDER BY step LIMIT ?",
            self._db.meta("prunable_before"),
            PRUNED_AT_ONCE,
        )
        for step, ids in done:
            groups = json.loads(ids)
            self._db.rows(f"DELETE FROM blobs WHERE lease_id IN ({','.join('?' * len(groups))})", *groups)
            self._db.rows("UPDATE batches SET pruned = 1 WHERE step = ?", step)
        if done:
            self._forget(done[-1][0] + 1 - self._history)

    def _forget(self, step: int) -> None:
        """Inside a transaction: delete the rows of steps before `step`, and keep their counts."""
        batch = self._db.one("SELECT lease_ids FROM batches WHERE step = ?", step)
        if batch is None or step <= self.forgotten("steps"):
            return
        where = "lease_id < ? AND state IN ('assigned', 'dropped', 'expired', 'skipped') AND (step IS NULL OR step < ?)"
        values = (min(json.loads(batch[0])), step)
        gone = self._db.rows(
            f"SELECT state, COUNT(*), COALESCE(SUM(timeouts), 0) FROM groups WHERE {where} GROUP BY state", *values
        )
        for state, groups, _ in gone:
            self._db.set_meta(f"forgotten_{state}", self.forgotten(state) + groups)
        self._db.set_meta("forgotten_timeouts", self.forgotten("timeouts") + sum(row[2] for row in gone))
        self._db.rows(f"DELETE FROM groups WHERE {where}", *values)
        self._db.rows("DELETE FROM batches WHERE step < ?", step)
        self._db.set_meta("forgotten_steps", step)

    def check_rewind(self, step: int) -> None:
        """Raises RunFailed when a batch of `step` or later can no longer be served."""
        pruned = self._db.scalar("SELECT COUNT(*) FROM batches WHERE pruned = 1 AND step >= ?", step)
        pruned += max(0, self.forgotten("steps") - step)
        if pruned:
            raise RunFailed(
                f"cannot resume from step {step}: the groups of {count(pruned, 'later step')} are gone",
                "resume from the newest checkpoint or the one before it",
            )

    def unacknowledge(self, step: int) -> None:
        """Inside a transaction of the caller: steps >= `step` were never trained; their batches stay as they are."""
        self._db.rows("UPDATE batches SET acked = 0, version = NULL WHERE step >= ?", step)
        self._db.set_meta("checkpoint_step", min(step, self._db.meta("checkpoint_step")))
