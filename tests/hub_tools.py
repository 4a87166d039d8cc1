"""A hub's store with settings of a small run, groups for it, and the steps that a run takes with it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from astracli.hub.store import HubStore
from astracli.hub.types import Counts, HubSettings, HubState, Leases, NextBatch
from astracli.rl.types import Group, Sample, Segment, pack_group, unpack_group


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def open_store(path: Path, **changes: Any) -> HubStore:
    settings: dict[str, Any] = {
        "batch_groups": 4,
        "max_staleness": 1,
        "drop_equal_groups": True,
        "lease_timeout_s": 60.0,
        "steps": 10,
        "eval_every": 0,
        "engines": ("engine0",),
    }
    store = {key: changes.pop(key) for key in ("curriculum", "clock", "checkpoint") if key in changes}
    return HubStore(path / "hub.sqlite", HubSettings(**(settings | changes)), **store)


def group(
    lease_id: int,
    version: int = 0,
    rewards: tuple[float, ...] = (0.0, 1.0),
    verdict: Any = "right",
    finish: Any = "stop",
) -> bytes:
    samples = [
        Sample(i, [Segment(version, np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32))], finish, r, verdict)
        for i, r in enumerate(rewards)
    ]
    return pack_group(Group(lease_id, f"p{lease_id}", np.array([1, 2], np.int32), samples))


def in_file(directory: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run one statement on the hub's file through a connection of its own; its rows."""
    with closing(sqlite3.connect(directory / "hub.sqlite", timeout=60.0)) as file, file:
        return file.execute(sql, values).fetchall()


def ids(reply: Leases) -> list[int]:
    return [lease.lease_id for lease in reply.leases]


def batch_ids(reply: NextBatch) -> list[int]:
    return [unpack_group(blob).lease_id for blob in reply.batch.groups]


def finish_step(store: HubStore, step: int, checkpoint_step: int | None = None) -> list[int]:
    got = batch_ids(store.batch(step))
    store.announce(step + 1, step + 1)
    store.engine_state("engine0", step + 1, "ready")
    store.ack(step, step + 1, checkpoint_step)
    return got


def fill(store: HubStore, version: int, n: int = 4) -> list[int]:
    leases = ids(store.lease("w", n, engine=None))
    for lease in leases:
        assert store.put(group(lease, version)) == "accepted"
    return leases


def counts_of(**known: int) -> Counts:
    return Counts(**known)


def hub_state(**known: Any) -> HubState:
    """What the hub of a run that has just begun answers, but for what is `known`."""
    nothing = {"steps": 10, "next_step": 0, "latest_version": None, "counts": Counts()}
    nothing |= {"dropped_in_a_row": 0, "skipped_in_a_row": 0, "engines": {}, "evals": [], "gpu_leases": {}}
    return HubState(**(nothing | {"finished": False, "stop": False} | known))
