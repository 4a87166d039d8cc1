"""Leases and groups: prompts go out under a lease, a graded group comes in under it, once.

A lease is granted while what is in flight and what waits stays within what staleness allows (`rl.schedule`). Expiry
times live in memory; on opening, every lease in flight goes back to the queue.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from astracli.hub.curriculum import Curriculum
from astracli.hub.schema import AMONG, Database
from astracli.hub.types import HubSettings, Lease, PutStatus
from astracli.rl.schedule import deadline
from astracli.rl.types import Group

DROPPED_KEPT = 8
"""Newest dropped groups that stay in memory: what a run that ends without signal shows."""
REMEMBERED_REQUESTS = 256


@dataclass
class LeaseBook:
    """Part of the store, which holds the database's lock around every call."""

    _db: Database
    _settings: HubSettings
    _curriculum: Curriculum | None
    _clock: Callable[[], float]

    def __post_init__(self) -> None:
        self._expiry: dict[int, float] = {}
        self._replies: OrderedDict[str, list[int]] = OrderedDict()
        self.dropped: deque[Group] = deque(maxlen=DROPPED_KEPT)
        self.requeue("state = 'leased'")

    def count(self, state: str) -> int:
        """Groups in a state of `schema.TABLES`."""
        return self._db.scalar("SELECT COUNT(*) FROM groups WHERE state = ?", state)

    def remembered(self, request: str | None) -> list[int] | None:
        """The leases that an earlier call with the same id got."""
        return None if request is None else self._replies.get(request)

    def grant(self, worker: str, take: int, version: int, request: str | None) -> list[int]:
        """`take` leases that start at `version`: the queue first, then new ones."""
        queued = self._db.rows(
            "SELECT lease_id, prompt, kind FROM groups WHERE state = 'queued' ORDER BY lease_id LIMIT ?", take
        )
        first = self._db.scalar("SELECT COALESCE(MAX(lease_id) + 1, 0) FROM groups")
        granted = [*queued, *((i, *self._choose(i)) for i in range(first, first + take - len(queued)))]
        ids = [int(row[0]) for row in granted]
        with self._db.transaction() as sql:
            sql.executemany(
                "INSERT OR REPLACE INTO groups (lease_id, state, worker, version, prompt, kind) "
                "VALUES (?, 'leased', ?, ?, ?, ?)",
                [(i, worker, version, prompt, kind) for i, prompt, kind in granted],
            )
        self._prolong(ids)
        if request is not None:
            self._replies[request] = ids
            if len(self._replies) > REMEMBERED_REQUESTS:
                self._replies.popitem(last=False)
        return ids

    def _choose(self, lease_id: int) -> tuple[int, str | None]:
        """(prompt, kind) of a new lease; without a curriculum the prompts in their order."""
        return (lease_id, None) if self._curriculum is None else self._curriculum.choose(self._db, lease_id)

    def with_prompts(self, lease_ids: list[int]) -> list[Lease]:
        found = dict(self._db.rows(f"SELECT lease_id, prompt FROM groups WHERE {AMONG}", json.dumps(lease_ids)))
        return [Lease(i, found[i]) for i in lease_ids]

    def _prolong(self, ids: Iterable[int]) -> None:
        expires = self._clock() + self._settings.lease_timeout_s
        self._expiry.update((i, expires) for i in ids)

    def renew(self, lease_ids: Sequence[int], worker: str | None) -> list[int]:
        """Prolong leases. -> those that are lost: ended, expired, or held by another worker now."""
        held = dict(self._db.rows("SELECT lease_id, worker FROM groups WHERE state = 'leased'"))
        lost = [i for i in lease_ids if i not in held or (worker is not None and held[i] != worker)]
        self._prolong(i for i in lease_ids if i not in lost)
        return lost

    def expire(self) -> int:
        """Leases past their time return to the queue. -> how many."""
        now = self._clock()
        late = [i for i, expires in self._expiry.items() if expires <= now]
        return self.give_back(late) if late else 0

    def give_back(self, lease_ids: Sequence[int]) -> int:
        """Leases return to the queue; those that have ended are left alone. -> how many returned."""
        return self.requeue(f"state = 'leased' AND {AMONG}", json.dumps(list(lease_ids)))

    def requeue(self, where: str, *values: Any) -> int:
        """The leases that match return to the queue. -> how many."""
        ids = [row[0] for row in self._db.rows(f"SELECT lease_id FROM groups WHERE {where}", *values)]
        if ids:
            with self._db.transaction() as sql:
                sql.executemany(
                    "UPDATE groups SET state = 'queued', worker = NULL, version = NULL WHERE lease_id = ?",
                    [(i,) for i in ids],
                )
        for i in ids:
            self._expiry.pop(i, None)
        return len(ids)

    def forget_since_last_batch(self) -> None:
        """As if no lease had been granted since the last batch was made; at staleness 0 those are the last ids."""
        first = self._db.scalar("SELECT COALESCE(MAX(lease_id) + 1, 0) FROM groups WHERE state = 'assigned'")
        with self._db.transaction() as sql:
            sql.execute("DELETE FROM groups WHERE lease_id >= ?", (first,))
            sql.execute("DELETE FROM blobs WHERE lease_id >= ?", (first,))
        self._expiry.clear()
        self._replies.clear()

    def put(self, group: Group, blob: bytes, next_step: int) -> PutStatus:
        """A graded group; `blob` is its packed form, `next_step` the next step without a batch.

        The first arrival counts, even when its lease has expired meanwhile; every later one is a duplicate.
        """
        row = self._db.one("SELECT state FROM groups WHERE lease_id = ?", group.lease_id)
        if row is None:
            return "unknown_lease"
        if row[0] not in ("leased", "queued"):
            return "duplicate"
        if self._settings.drop_equal_groups and not group.has_signal:
            status: PutStatus = "dropped"
            self.dropped.append(group)
        elif deadline(group.oldest_version, self._settings.max_staleness) < next_step:
            status = "stale"
        else:
            status = "accepted"
        self._settle(group, status, blob, next_step)
        self._expiry.pop(group.lease_id, None)
        return status

    def _settle(self, group: Group, status: PutStatus, blob: bytes, next_step: int) -> None:
        state = {"dropped": "dropped", "stale": "expired", "accepted": "kept"}[status]
        rewards = group.rewards
        place = self._db.meta("places")
        values = {
            "state": state,
            "version": group.oldest_version,
            "arrived": next_step,
            "place": place,
            "reward_mean": float(rewards.mean()) if len(rewards) else 0.0,
            "samples": len(group.samples),
            "tokens": sum(s.drawn for s in group.samples),
            "timeouts": sum(s.verdict == "timeout" for s in group.samples),
            "errors": sum(s.verdict == "error" for s in group.samples),
            "no_answer": sum(s.verdict == "no_answer" for s in group.samples),
            "truncated": sum(s.finish_reason == "length" for s in group.samples),
            "parts": _sums(group),
            "source": group.meta.get("source"),
        }
        with self._db.transaction() as sql:
            sql.execute(
                f"UPDATE groups SET {', '.join(f'{key} = ?' for key in values)} WHERE lease_id = ?",
                (*values.values(), group.lease_id),
            )
            self._db.set_meta("places", place + 1)
            if state == "kept":
                sql.execute("INSERT INTO blobs (lease_id, blob) VALUES (?, ?)", (group.lease_id, blob))
            if state != "expired":
                before = self._db.meta("dropped_in_a_row")
                self._db.set_meta("dropped_in_a_row", before + 1 if state == "dropped" else 0)
            self._db.set_meta("skipped_in_a_row", 0)

    def skip(self, lease_id: int, reason: str) -> None:
        """Nothing can be generated from this prompt (too long). Frees its capacity; counted."""
        with self._db.transaction() as sql:
            change = sql.execute(
                "UPDATE groups SET state = 'skipped', reason = ? WHERE lease_id = ? AND state IN ('leased', 'queued')",
                (reason, lease_id),
            )
            if change.rowcount:
                self._db.set_meta("skipped_in_a_row", self._db.meta("skipped_in_a_row") + 1)
        self._expiry.pop(lease_id, None)


def _sums(group: Group) -> str | None:
    """{name: [sum, samples]} of the rewards' parts, as JSON; None without any."""
    found: dict[str, list[float]] = {}
    for sample in group.samples:
        for name, value in sample.parts.items():
            total, count = found.get(name, (0.0, 0))
            found[name] = [total + value, count + 1]
    return json.dumps(found) if found else None
