"""The hub under a long history: how long the trainer waits for `/batch`, how long everyone else waits, how large it is.

    python bench/loop/hub.py [--samples 1000000] [--batches 100] [--keep-all]

Fills hub.sqlite with the rows that a run of this length leaves (blobs pruned, as in a real run), then plays steps of
256 sequences of 4096 tokens (32 groups x 8) through the hub's HTTP: put, batch, acknowledge. `--keep-all` leaves every
row in place instead of the recipe's `launch.hub_history_steps`. Exits 1 when the p99 of `/batch` is 100 ms or more.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from astracli.hub.api import build_app
from astracli.hub.client import HubClient
from astracli.hub.store import HubStore
from astracli.hub.types import HISTORY, HubSettings, Lease
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.rl.types import Group, Sample, Segment, unpack_group

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show, spread

GROUPS, SAMPLES, TOKENS = 32, 8, 4096
DROPPED = 1 / 4
"""Of all groups, those without signal."""
EVERY = 10
"""Steps between two checkpoints."""
TARGET_MS = 100.0


def open_store(path: Path, history_steps: int) -> HubStore:
    settings = HubSettings(
        batch_groups=GROUPS, max_staleness=8, drop_equal_groups=True, lease_timeout_s=600.0, steps=10**6,
        eval_every=0, engines=("engine0",), history_steps=history_steps,
    )  # fmt: skip
    return HubStore(path, settings)


def fill(store: HubStore, samples: int) -> int:
    """Rows of a run that has consumed `samples`. -> its next step."""
    steps = samples // (GROUPS * SAMPLES)
    per_step = round(GROUPS / (1 - DROPPED))
    groups: list[tuple[Any, ...]] = []
    batches: list[tuple[Any, ...]] = []
    for step in range(steps):
        first = step * per_step
        groups += [
            (first + i, "assigned" if i < GROUPS else "dropped", "rollout", step, step if i < GROUPS else None, step,
             0.5, SAMPLES, SAMPLES * TOKENS, 0)
            for i in range(per_step)
        ]  # fmt: skip
        stats = {"arrived_groups": per_step, "dropped_groups": per_step - GROUPS, "reward_mean": 0.5}
        batches.append((step, json.dumps(list(range(first, first + GROUPS))), json.dumps(stats), 1, step + 1, 1))
    with store._db.transaction() as sql:
        names = "lease_id, state, worker, version, step, arrived, reward_mean, samples, tokens, timeouts"
        sql.executemany(f"INSERT INTO groups ({names}) VALUES ({', '.join('?' * 10)})", groups)
        into = "batches (step, lease_ids, stats, acked, version, pruned)"
        sql.executemany(f"INSERT INTO {into} VALUES (?, ?, ?, ?, ?, ?)", batches)
        sql.executemany("INSERT INTO versions VALUES (?, ?)", [(step, step) for step in range(steps + 1)])
        store._db.set_meta("checkpoint_step", steps)
    return steps


def group(lease: int, version: int, rng: np.random.Generator) -> Group:
    """8 samples of 4096 tokens."""
    samples = []
    for i in range(SAMPLES):
        part = Segment(version, rng.integers(0, 248320, TOKENS, np.int32), -rng.random(TOKENS, np.float32))
        samples.append(Sample(i, [part], "stop", float(i % 2), "right" if i % 2 else "wrong", "text " * TOKENS))
    return Group(lease, f"problem-{lease}", rng.integers(0, 248320, 200, np.int32), samples, "question", "42")


def timed(into: list[float], call: Callable[..., Any], *values: Any, **named: Any) -> Any:
    began = time.perf_counter()
    reply = call(*values, **named)
    into.append(1000 * (time.perf_counter() - began))
    return reply


def play(url: str, first: int, batches: int, folder: Path) -> tuple[dict[str, list[float]], int]:
    """(ms of every kind of call, largest size of the database with its log in bytes)."""
    rng = np.random.default_rng(0)
    client = HubClient(url, "t")
    names = ("lease", "put a group", "batch", "unpack the batch", "ack", "ack with a checkpoint", "state")
    ms: dict[str, list[float]] = {name: [] for name in names}
    largest = 0
    for step in range(first, first + batches):
        client.announce(step, step)
        client.engine_state("engine0", step, "ready")
        leases: list[Lease] = []
        while len(leases) < GROUPS:
            leases += timed(ms["lease"], client.lease, "rollout", GROUPS - len(leases), engine="engine0").leases
        for lease in leases:
            made = group(lease.lease_id, step, rng)
            timed(ms["put a group"], client.put_group, made)
        reply = timed(ms["batch"], client.batch, step)
        timed(ms["unpack the batch"], lambda blobs: [unpack_group(blob) for blob in blobs], reply.batch.groups)
        saved = step + 1 if (step + 1) % EVERY == 0 else None
        timed(ms["ack with a checkpoint" if saved else "ack"], client.ack, step, step + 1, saved)
        timed(ms["state"], client.state)
        largest = max(largest, sum(path.stat().st_size for path in folder.glob("hub.sqlite*")))
    client.close()
    return ms, largest


def main() -> None:
    args = options(__doc__, samples=1_000_000, batches=100, keep_all=False).parse_args()
    history = 10**9 if args.keep_all else HISTORY
    with folder() as name:
        store = open_store(name / "hub.sqlite", history)
        first = fill(store, args.samples)
        rows = store.counts()
        before = sum(path.stat().st_size for path in name.glob("hub.sqlite*"))
        server = ServerThread(build_app(store, "t"), bind("127.0.0.1")).start()
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as other:  # as in a run: not the hub's process
            ms, largest = other.submit(play, server.url, first, args.batches, name).result()
        kept, after = store._db.scalar("SELECT COUNT(*) FROM groups"), store.counts()
        server.stop()
        store.close()
    calls = [{"call": call, **(spread(v) or {}), "max": max(v, default=None)} for call, v in ms.items()]
    p99 = next(row["p99"] for row in calls if row["call"] == "batch")
    found = {
        "history_samples": first * GROUPS * SAMPLES, "history_groups": rows.consumed_groups + rows.dropped,
        "rows_kept": kept, "rows_counted": after.consumed_groups + after.dropped,
        "batch_tokens": GROUPS * SAMPLES * TOKENS, "database_mb": before / 1e6, "largest_mb": largest / 1e6,
        "batch_p99_ms": p99, "asked_under_ms": TARGET_MS,
    }  # fmt: skip
    show(args, found | {"ms": calls})
    sys.exit(1 if p99 >= TARGET_MS else 0)


if __name__ == "__main__":
    main()
