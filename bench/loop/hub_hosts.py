"""The hub under many hosts: 64 agents x 8 engines that make groups at a fixed rate. How long is a lease asked for, and
how much of a core does the hub take?

    python bench/loop/hub_hosts.py [--agents 64] [--engines 8] [--group-s 8] [--seconds 40] [--tokens 512]

The hub is a process of its own. Another plays what agents and their processes ask it, over HTTP and with their tokens:
orders (long polls), a report a second with the heartbeats of its processes, targets of engines (long polls), leases,
groups of 8 samples; and a trainer that takes batches and announces versions. Every engine has a group every `--group-s`
seconds. The p99 is as the askers see it, who share this machine with the hub: `load` is the machine's, cores are the
processor seconds of the hub's process. Exits 1 when the p99 is over 50 ms or the hub takes more than a core.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from astracli.hub.agents import Agents
from astracli.hub.api import build_app
from astracli.hub.client import AsyncHubClient
from astracli.hub.store import HubStore
from astracli.hub.types import HubSettings
from astracli.process.http import Http, HttpError
from astracli.process.open_files import raise_open_files
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.rl.types import Group, Sample, Segment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, show, spread

SAMPLES, BATCH_GROUPS, STALENESS = 8, 256, 8
WARM_S = 5.0
TARGET_MS, TARGET_CORES = 50.0, 1.0
VERSIONS = {"astracli": "1"}


def hub(pipe: Connection, place: Path, agents: int, engines: int) -> None:
    """Serves until told to end; tells tokens, then processor seconds whenever it is asked."""
    raise_open_files()
    names = [f"h{n}" for n in range(agents)]
    settings = HubSettings(
        batch_groups=BATCH_GROUPS, max_staleness=STALENESS, drop_equal_groups=False, lease_timeout_s=600.0,
        steps=10**6, eval_every=0, engines=tuple(f"engine{n}" for n in range(agents * engines)), history_steps=20,
    )  # fmt: skip
    fleet, store = Agents(names, run="r", versions=VERSIONS, lease_s=60.0), HubStore(place / "hub.sqlite", settings)
    tokens = [fleet.join(name, fleet.ticket(name), name, "127.0.0.1", [], dict(VERSIONS), {}).token for name in names]
    server = ServerThread(build_app(store, "run", agents=fleet, on_status=lambda body: None), bind()).start()
    pipe.send((server.url, tokens))
    while pipe.recv() == "cpu":
        spent = psutil.Process().cpu_times()
        pipe.send(spent.user + spent.system)
    server.stop()
    store.close()


class Play:
    """What agents, their processes and the trainer ask."""

    def __init__(self, url: str, tokens: list[str], args: Any):
        self._url, self._tokens, self._args = url, tokens, args
        self.ms: list[float] = []
        self.asked = self.groups = 0
        self.counting = False
        self.over = False
        self._draw = random.Random(args.seed)
        numbers = np.random.default_rng(args.seed)
        part = (numbers.integers(0, 248320, args.tokens, np.int32), -numbers.random(args.tokens, np.float32))
        segments = [Segment(0, *part)]
        self._samples = [Sample(i, segments, "stop", float(i % 2), "wrong", "text") for i in range(SAMPLES)]
        self._versions: dict[str, int] = {}

    async def run(self) -> None:
        trainer = AsyncHubClient(self._url, "run")
        await trainer.announce(0, 0)
        work = [self._trainer(trainer)]
        for n, token in enumerate(self._tokens):
            work += [self._reports(n, token), self._orders(token)]
            client = AsyncHubClient(self._url, token)
            for e in range(self._args.engines):
                name = f"engine{n * self._args.engines + e}"
                work += [self._engine(client, n, name), self._target(client, name)]
        await asyncio.gather(*work)

    async def _trainer(self, client: AsyncHubClient) -> None:
        step = 0
        while not self.over:
            found = await client.batch(step, wait_s=1.0)
            if found.batch is None:
                continue
            await client.announce(step + 1, step + 1)
            await client.ack(step, step + 1, step + 1)
            step += 1

    async def _engine(self, client: AsyncHubClient, n: int, name: str) -> None:
        await asyncio.sleep(self._draw.uniform(0, self._args.group_s))
        version = 0
        await client.engine_state(name, 0, "ready")
        while not self.over:
            began = time.perf_counter()
            reply = await client.lease(f"rollout{n}", 1, engine=name)
            took = 1000 * (time.perf_counter() - began)
            if self.counting:
                self.ms.append(took)
                self.asked += 1
            if not reply.leases:
                await asyncio.sleep(0.25)
                version = await self._newest(client, name, version)
                continue
            await asyncio.sleep(self._args.group_s)
            lease = reply.leases[0].lease_id
            of_now = [Segment(version, p.tokens, p.logprobs) for p in self._samples[0].segments]
            made = [replace(sample, segments=of_now) for sample in self._samples]
            await client.put_group(Group(lease, f"p{lease}", np.zeros(64, np.int32), made, "question", "42"))
            self.groups += self.counting
            version = await self._newest(client, name, version)

    async def _newest(self, client: AsyncHubClient, name: str, version: int) -> int:
        now = self._versions.get(name, version)
        if now != version:
            await client.engine_state(name, now, "ready")
        return now

    async def _target(self, client: AsyncHubClient, name: str) -> None:
        have: int | None = None
        while not self.over:
            reply = await client.target(name, have=have, pinned=False, wait_s=2.0)
            if reply.version is not None:
                have = self._versions[name] = reply.version

    async def _reports(self, n: int, token: str) -> None:
        http = Http(self._url, token)
        names = [f"engine{n * self._args.engines + e}" for e in range(self._args.engines)] + [f"rollout{n}"]
        beats = [
            {"name": name, "pid": 1, "state": "ready", "waiting": None, "progress": {"tokens_per_s": 1000.0}}
            for name in names
        ]
        body = {"processes": [], "usage": {name: [10**9, 100] for name in names}, "memory": {}, "beats": beats}
        await self._post(http, "/agent/report", body, every=1.0)

    async def _orders(self, token: str) -> None:
        await self._post(Http(self._url, token), "/agent/orders", {"done": 0, "wait_s": 5.0}, every=0.0)

    async def _post(self, http: Http, path: str, body: dict[str, Any], every: float) -> None:
        content = json.dumps(body).encode()
        await asyncio.sleep(self._draw.uniform(0, 1.0))
        while not self.over:
            with suppress(HttpError):  # a connection that was closed as it was used: an agent asks again, too
                reply = await http.request("POST", path, content, timeout=30.0)
                assert reply.status_code == 200, reply.text
            await asyncio.sleep(every)


async def measured(play: Play, pipe: Connection, seconds: float) -> float:
    """-> processor seconds of the hub in a second of `seconds`."""
    playing = asyncio.ensure_future(play.run())
    await asyncio.sleep(play._args.group_s + WARM_S)

    def cpu() -> float:
        pipe.send("cpu")
        return float(pipe.recv())

    before, began, play.counting = cpu(), time.monotonic(), True
    await asyncio.wait([playing], timeout=seconds)
    if playing.done():
        playing.result()
    play.counting, spent = False, cpu() - before
    play.over = True
    cores = spent / (time.monotonic() - began)
    await asyncio.wait_for(playing, 30.0)
    return cores


def main() -> None:
    parser = options(__doc__, agents=64, engines=8, group_s=8.0, seconds=40.0, tokens=512, seed=0)
    args = parser.parse_args()
    raise_open_files()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with folder() as name:
        process = context.Process(target=hub, args=(theirs, name, args.agents, args.engines), daemon=True)
        process.start()
        url, tokens = ours.recv()
        play = Play(url, tokens, args)
        cores = asyncio.run(measured(play, ours, args.seconds))
        ours.send("end")
        process.join(20)
    ms = spread(play.ms) or {}
    show(args, {
        "agents": args.agents, "engines": args.agents * args.engines, "groups_per_s": play.groups / args.seconds,
        "leases_per_s": play.asked / args.seconds, "hub_cores": cores, "lease_ms": [ms],
        "load": os.getloadavg()[0], "asked": f"p99 <= {TARGET_MS:g} ms, under {TARGET_CORES:g} core",
    })  # fmt: skip
    sys.exit(1 if ms.get("p99", 0.0) > TARGET_MS or cores > TARGET_CORES else 0)


if __name__ == "__main__":
    main()
