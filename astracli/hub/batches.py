"""Batches: which groups a step trains on, fixed before anyone is told, and what is known to be consumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from astracli.errors import RunFailed
from astracli.hub import no_signal
from astracli.hub.schema import AMONG, Database
from astracli.hub.types import Batch, BatchStats, Counts, HubSettings, NextBatch, NoSignal
from astracli.rl.schedule import Replays, batch_reason, count, replays_due

PRUNED_AT_ONCE = 2
"""Steps; one is made at each acknowledgement, so two keep up."""


_CHECKPOINT = "checkpoint_at_"
"""How keys begin whose value stands for the content of a step's checkpoint."""


class BatchBook:
    """Part of the store, which holds the database's lock around every call."""

    def __init__(self, database: Database, settings: HubSettings, checkpoint: Callable[[int], int | None]):
        """`checkpoint`: a number that stands for the content of the checkpoint of a step; None without one."""
        self._db = database
        self._settings = settings
        self._checkpoint = checkpoint
        self._fifo = settings.consume == "fifo"
        self._size = settings.batch_groups
        self.hopeless: NoSignal | None = None
        """Why the run is to end: the trainer asked for a batch, and no more groups will make one."""

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
        """Rows that retention deleted: `steps`, `replayed` ones, groups by state; `timeouts`, `errors` of samples."""
        return self._db.meta(f"forgotten_{what}")

    @property
    def replayed(self) -> int:
        """Steps, of the consumed ones, that trained on a batch again."""
        kept = self._db.scalar("SELECT COUNT(*) FROM batches WHERE acked = 1 AND replay_of IS NOT NULL")
        return kept + self.forgotten("replayed")

    def counts(self) -> Counts:
        states = dict(self._db.rows("SELECT state, COUNT(*) FROM groups WHERE state != 'assigned' GROUP BY state"))
        acked, replayed = self.acked, self.replayed
        timeouts = self._db.scalar("SELECT COALESCE(SUM(timeouts), 0) FROM groups WHERE timeouts > 0")
        errors = self._db.scalar("SELECT COALESCE(SUM(errors), 0) FROM groups WHERE errors > 0")
        return Counts(
            in_flight=states.get("leased", 0),
            queued=states.get("queued", 0),
            waiting=states.get("kept", 0),
            **{state: states.get(state, 0) + self.forgotten(state) for state in ("dropped", "expired", "skipped")},
            timeouts=timeouts + self.forgotten("timeouts"),
            reward_errors=errors + self.forgotten("errors"),
            consumed_steps=acked,
            consumed_groups=0 if self._settings.own_batches else (acked - replayed) * self._size,
            replayed_steps=replayed,
        )

    @property
    def replays(self) -> Replays:
        """What admission must know of batches that are trained on again."""
        last = self._db.one("SELECT step, replay_of, lease_ids FROM batches ORDER BY step DESC LIMIT 1")
        ratio = self._settings.replay_ratio
        if not ratio or last is None:
            return Replays(ratio)
        step, replay_of, ids = last
        due = replays_due(
            ratio=ratio,
            done=0 if replay_of is None else step - replay_of,
            oldest_version=self._db.scalar(f"SELECT MIN(version) FROM groups WHERE {AMONG}", ids),
            max_staleness=self._settings.max_staleness,
            next_step=step + 1,
        )
        return Replays(ratio, due)

    def serve(self, step: int) -> NextBatch:
        """The groups of `step`, always the same ones once they were assigned; or what it waits for.

        Raises RunFailed for a step out of order. Would it wait for groups although `max_dropped_batches` batches' worth
        in a row had no signal, `hopeless` says so.
        """
        row = self._db.one("SELECT lease_ids, stats, pruned, replay_of FROM batches WHERE step = ?", step)
        if row is None:
            wait = self._assign(step)
            return self.serve(step) if wait is None else NextBatch(None, wait)
        ids, stats, pruned, replay_of = row
        if pruned:
            raise RunFailed(f"the groups of step {step} are gone: two later checkpoints have been acknowledged")
        blobs = dict(self._db.rows(f"SELECT lease_id, blob FROM blobs WHERE {AMONG}", ids))
        known = {"reward_mean": None} | json.loads(stats)
        replay = 0 if replay_of is None else step - replay_of
        return NextBatch(Batch(step, [blobs[i] for i in json.loads(ids)], BatchStats(**known), replay))

    def _assign(self, step: int) -> str | None:
        """Fix the groups of the next step. -> None, or what it waits for.

        The last batch again while its replays are due, unless that would make a group too old. Otherwise new groups:
        earliest deadline first, then lease id; or in the order of arrival. With deadlines, a group in flight whose
        deadline is this very step is waited for: otherwise long completions would be thrown away, and the policy would
        learn from short ones only. In the order of arrival that is so, and they are counted as expired.
        """
        if step != self.next_step or step >= self._settings.steps:
            raise RunFailed(f"batch {step} was asked for; the next one is {self.next_step} of {self._settings.steps}")
        oldest = step - self._settings.max_staleness
        self._discard_older(oldest)
        last_chance = self._db.scalar(
            "SELECT COUNT(*) FROM groups WHERE state IN ('kept', 'leased') AND version = ?", oldest
        )
        if self.replays.due and not last_chance:
            self._repeat(step)
            return None
        order = "place" if self._fifo else "version, lease_id"
        kept = self._db.rows(f"SELECT lease_id FROM groups WHERE state = 'kept' ORDER BY {order} LIMIT ?", self._size)
        due = self._db.scalar("SELECT COUNT(*) FROM groups WHERE state = 'leased' AND version = ?", oldest)
        due = 0 if self._fifo else due
        if len(kept) < self._size:
            self.hopeless = no_signal.found(self._db, self._settings)
        if len(kept) < self._size or due:
            return batch_reason(
                step=step,
                ready=len(kept),
                batch_groups=self._size,
                in_flight=self._db.scalar("SELECT COUNT(*) FROM groups WHERE state = 'leased'"),
                due=due,
                dropped_in_a_row=self._db.meta("dropped_in_a_row"),
                skipped_in_a_row=self._db.meta("skipped_in_a_row"),
            )
        ids = [int(row[0]) for row in kept]
        if self._settings.deterministic:
            ids.sort()
        self._fix(step, ids, None)
        return None

    def _repeat(self, step: int) -> None:
        """The groups of the step before once more."""
        row = self._db.one("SELECT lease_ids, COALESCE(replay_of, step) FROM batches WHERE step = ?", step - 1)
        assert row is not None
        self._fix(step, json.loads(row[0]), int(row[1]))

    def _fix(self, step: int, ids: list[int], replay_of: int | None) -> None:
        again = int(replay_of is not None)
        with self._db.transaction() as sql:
            sql.executemany(
                "UPDATE groups SET state = 'assigned', step = ?, replays = replays + ? WHERE lease_id = ?",
                [(step, again, i) for i in ids],
            )
            sql.execute(
                "INSERT INTO batches (step, lease_ids, stats, replay_of) VALUES (?, ?, ?, ?)",
                (step, json.dumps(ids), json.dumps(asdict(self._stats(step))), replay_of),
            )

    def _discard_older(self, oldest: int) -> None:
        late = self._db.rows("SELECT lease_id FROM groups WHERE state = 'kept' AND version < ?", oldest)
        if late:
            with self._db.transaction() as sql:
                sql.executemany("UPDATE groups SET state = 'expired' WHERE lease_id = ?", late)
                sql.executemany("DELETE FROM blobs WHERE lease_id = ?", late)

    def _stats(self, step: int) -> BatchStats:
        row = self._db.one(
            "SELECT COUNT(*), COALESCE(SUM(state = 'dropped'), 0), COALESCE(SUM(state = 'expired'), 0), "
            "AVG(reward_mean), COALESCE(SUM(tokens), 0), COALESCE(SUM(samples), 0), COALESCE(SUM(timeouts), 0), "
            "COALESCE(SUM(errors), 0) FROM groups WHERE arrived = ?",
            step,
        )
        assert row is not None
        parts = self._db.rows("SELECT parts FROM groups WHERE arrived = ? AND parts IS NOT NULL", step)
        means = _means(json.loads(text) for (text,) in parts)
        by_source = self._db.rows(
            "SELECT source, COUNT(*), AVG(reward_mean) FROM groups WHERE arrived = ? AND source IS NOT NULL "
            "GROUP BY source ORDER BY source",
            step,
        )
        sources = {name: {"groups": count, "reward_mean": mean} for name, count, mean in by_source}
        return BatchStats(*(*row, means, sources))

    def ack(self, step: int, version: int, checkpoint_step: int | None) -> None:
        """The batch of `step` has become `version`. Twice is once. Raises RunFailed for a step without a batch.

        `checkpoint_step` c: a checkpoint that has trained steps < c is on disk. Groups are kept back to the checkpoint
        before it, so that either can be resumed from. A run that has no checkpoint and makes none cannot be resumed in
        the middle: nothing is kept but this step's groups, which the next one may train on again.
        """
        while self._settings.own_batches and self.next_step <= step < self._settings.steps:
            self._fix(self.next_step, [], None)
        with self._db.transaction() as sql:
            change = sql.execute("UPDATE batches SET acked = 1, version = ? WHERE step = ?", (version, step))
            if not change.rowcount:
                raise RunFailed(f"step {step} was acknowledged, but has no batch; the next one is {self.next_step}")
            before = self._db.meta("checkpoint_step")
            if checkpoint_step is not None and checkpoint_step > before:
                self._db.set_meta("checkpoint_step", checkpoint_step)
                self._db.set_meta("prunable_before", before)
                if (made := self._checkpoint(checkpoint_step)) is not None:
                    self._db.set_meta(f"{_CHECKPOINT}{checkpoint_step}", made)
            elif not self._settings.checkpoints and not before:
                self._db.set_meta("prunable_before", max(step, self._db.meta("prunable_before")))
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
            # a group that a later step trains on again is still needed there
            self._db.rows(
                f"DELETE FROM blobs WHERE lease_id IN (SELECT lease_id FROM groups WHERE {AMONG} AND step <= ?)",
                ids,
                step,
            )
            self._db.rows("UPDATE batches SET pruned = 1 WHERE step = ?", step)
        if done:
            self._forget(done[-1][0] + 1 - self._settings.history_steps)

    def _forget(self, step: int) -> None:
        """Inside a transaction: delete the rows of steps before `step`, and keep their counts."""
        batch = self._db.one("SELECT lease_ids FROM batches WHERE step = ?", step)
        if batch is None or step <= self.forgotten("steps"):
            return
        where = "lease_id < ? AND state IN ('assigned', 'dropped', 'expired', 'skipped') AND (step IS NULL OR step < ?)"
        values = (min(json.loads(batch[0]), default=0), step)
        gone = self._db.rows(
            f"SELECT state, COUNT(*), COALESCE(SUM(timeouts), 0), COALESCE(SUM(errors), 0) FROM groups WHERE {where} "
            "GROUP BY state",
            *values,
        )
        for state, groups, *_ in gone:
            self._db.set_meta(f"forgotten_{state}", self.forgotten(state) + groups)
        self._db.set_meta("forgotten_timeouts", self.forgotten("timeouts") + sum(row[2] for row in gone))
        self._db.set_meta("forgotten_errors", self.forgotten("errors") + sum(row[3] for row in gone))
        self._db.rows(f"DELETE FROM groups WHERE {where}", *values)
        again = self._db.scalar("SELECT COUNT(*) FROM batches WHERE step < ? AND replay_of IS NOT NULL", step)
        self._db.set_meta("forgotten_replayed", self.forgotten("replayed") + again)
        self._db.rows("DELETE FROM batches WHERE step < ?", step)
        self._db.set_meta("forgotten_steps", step)

    @property
    def begins_anew(self) -> bool:
        """Whether groups are gone that no checkpoint stands for."""
        gone = self._db.scalar("SELECT COUNT(*) FROM batches WHERE pruned = 1") + self.forgotten("steps")
        return bool(gone) and not self._db.meta("checkpoint_step")

    def forget_all(self) -> None:
        """Inside a transaction of the caller: as if nothing had been granted, generated or trained on yet."""
        for table in ("groups", "blobs", "batches"):
            self._db.rows(f"DELETE FROM {table}")
        self._db.rows("DELETE FROM meta WHERE key != 'schema_version'")

    def check_rewind(self, step: int) -> None:
        """Raises RunFailed when a batch of `step` or later can no longer be served, when earlier ones are unknown, and
        when the checkpoint of `step` is not the one that this database has seen."""
        if step > self.next_step and not self._settings.own_batches:  # the trainer's own ones follow from the step
            raise RunFailed(
                f"hub.sqlite is damaged or an old copy: it knows the batches of {count(self.next_step, 'step')}, the "
                f"checkpoint has trained {step}",
                f"move checkpoints behind step {self.next_step} out of the run's `checkpoints` folder to go on from an "
                "older one, or start a new run with `astra train --from RUN_DIR`",
            )
        known, found = self._db.meta(f"{_CHECKPOINT}{step}"), self._checkpoint(step)
        if known and found is not None and known != found:
            raise RunFailed(
                f"hub.sqlite and the checkpoint of step {step} are of two runs: one of them was replaced",
                "put the file of this run back, or start a new run with `astra train --from RUN_DIR`",
            )
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
        later = "key GLOB ? AND CAST(substr(key, ?) AS INTEGER) > ?"  # they are made again
        self._db.rows(f"DELETE FROM meta WHERE {later}", f"{_CHECKPOINT}*", len(_CHECKPOINT) + 1, step)


def _means(groups: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over samples, from sums and counts by group."""
    sums: dict[str, tuple[float, int]] = {}
    for group in groups:
        for name, (total, samples) in group.items():
            before, among = sums.get(name, (0.0, 0))
            sums[name] = (before + total, among + samples)
    return {name: total / samples for name, (total, samples) in sorted(sums.items())}
