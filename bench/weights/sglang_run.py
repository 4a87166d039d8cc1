"""Versions that go into one SGLang, for `into_sglang.py`: how each is brought there, and what is found of it."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from shared import say, spread

from astracli.engines.client import EngineClient
from astracli.engines.contract import UNPROVEN, flushes
from astracli.process.atomic import write_atomic
from astracli.weights.receive.subscriber import Subscriber
from weights.sglang_server import TOKEN, Server, Trainer
from weights.streams import MARGIN, Kept, Meter

RECOVERY_S = 8.0

BEGAN = time.monotonic()
NO_FIGURES = ("version", "linked", "ahead", "counted")


class Record:
    """What is known so far: to stderr at once, and whole to --out."""

    def __init__(self, out: Path | None):
        self.out, self.doc = out, {"setup": {}, "rows": []}
        self.setup, self.rows = self.doc["setup"], self.doc["rows"]

    def note(self, **found: Any) -> None:
        """A figure of the setup, with the seconds since the start."""
        self.setup.update(found)
        self._tell({"at_s": round(time.monotonic() - BEGAN, 2), **found})

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._tell(row)

    def _tell(self, doc: dict[str, Any]) -> None:
        say(doc)
        if self.out is not None:
            self.doc["summary"] = summary(self.rows)
            write_atomic(self.out, json.dumps(self.doc, indent=1).encode())


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mode -> figure -> median, 99th percentile (the worst of fewer than a hundred), number of counted versions."""
    found: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows if row.get("counted")):
        flat = [row | row["split_ms"] for row in rows if row.get("counted") and row["mode"] == mode]
        found[mode] = {}
        numbers = {key for row in flat for key, value in row.items() if isinstance(value, int | float)}
        for key in sorted(numbers - {*NO_FIGURES}):
            found[mode][key] = spread(row[key] for row in flat if row.get(key) is not None)
        if late := [row for row in flat if row.get("recovery_s", 0.0) is None]:
            found[mode]["not_recovered"] = {"p50": len(late), "p99": len(late), "n": len(flat)}
        staged = [row for row in flat if row.get("tokens_per_s")]
        if staged:  # a window is a fraction of a second: all together
            usual = sum(row["tokens_per_s"] * row["staging_s"] for row in staged)
            ratio = sum(row["staging_tokens_per_s"] * row["staging_s"] for row in staged) / max(1e-9, usual)
            found[mode]["staging_ratio"] = {"p50": ratio, "p99": ratio, "n": len(staged)}
    return found


class Versions:
    """The trainer's versions in their order: some are published while the server starts, the others when asked for."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._published = 0
        self._ahead: deque[dict[str, Any]] = deque()

    async def ahead(self, most: int, ready: asyncio.Task[None]) -> int:
        """Publish up to `most` versions until the server is ready: how many."""
        while len(self._ahead) < most and not ready.done():
            found = await self._publish()
            unheard = {key: value for key, value in found.items() if not key.endswith("_s")}  # no engine ran beside it
            self._ahead.append(unheard | {"ahead": True})
        return len(self._ahead)

    async def take(self) -> dict[str, Any]:
        """The next version, and what publishing it beside the engine took."""
        return self._ahead.popleft() if self._ahead else await self._publish()

    async def _publish(self) -> dict[str, Any]:
        self._published += 1
        self._trainer.step()
        return {"version": self._published} | await asyncio.to_thread(self._trainer.publish, self._published)


class Run:
    """One server, its subscriber, and the versions that go into it."""

    def __init__(self, args: argparse.Namespace, versions: Versions, subscriber: Subscriber, client: EngineClient):
        self.args, self.versions, self.subscriber, self.client = args, versions, subscriber, client

    async def first(self) -> dict[str, Any]:
        """Version 0, published already, into a server that makes its weights up; nothing runs."""
        began = time.monotonic()
        self.subscriber.wake(UNPROVEN)  # refused, since these weights are made up, but our loader runs now
        await self.client.pause("abort")
        await self.client.apply_staged(UNPROVEN)
        await self.client.resume()
        woken_s = time.monotonic() - began
        row = await self._bring(0, "abort", None)
        return row | {"wake_s": woken_s, "version_0_s": time.monotonic() - began}

    async def next(self, mode: str, meter: Meter, *, watched: bool) -> dict[str, Any]:
        """A delta, from the trainer's step to the last read-back; `watched`: with the streams' rates around it."""
        began = time.monotonic()
        published = await self.versions.take()
        row = {"mode": mode, **published, **await self._bring(published["version"], mode, meter, watched=watched)}
        row["bytes_per_changed"] = row["bytes"] / max(1, row["changed"])
        row["decode_gb_per_s"] = row["full_bytes"] / 1e9 / max(1e-9, row["decode_s"])
        row["version_s"] = time.monotonic() - began
        return row

    async def _bring(self, version: int, mode: str, meter: Meter | None, *, watched: bool = False) -> dict[str, Any]:
        quiet = time.monotonic()
        await asyncio.sleep(self.args.quiet_s if watched else 0.0)
        staging = time.monotonic()
        plan = await asyncio.to_thread(self.subscriber.fetch, version, version - 1 if version else None)
        times = [time.monotonic()]
        if mode == "abort" and meter:
            await meter.drain(self.client.abort_all)
        times.append(time.monotonic())
        await self.client.pause(mode)
        times.append(time.monotonic())
        answer = await self.client.apply_staged(version, flush=flushes(mode))
        times.append(time.monotonic())
        await self.client.resume()
        times.append(time.monotonic())
        if not answer.success:
            raise RuntimeError(f"version {version} was not applied: {answer.message}")
        result = answer.outcome
        abort_ms, pause_ms, call_ms, continue_ms = (1000 * (b - a) for a, b in itertools.pairwise(times))
        row: dict[str, Any] = {
            "version": version, "kind": plan.kind, "bytes": plan.bytes, "linked": plan.linked,
            "changed": result["changed"], "staging": result.get("staging"), "transfer_s": plan.transfer_s,
            "stage_s": plan.stage_s, "decode_s": result["decode_s"], "load_s": result["load_s"], "abort_ms": abort_ms,
            "pause_ms": pause_ms + call_ms + continue_ms,
            "split_ms": {
                "pause": pause_ms, "call": call_ms, "apply": 1000 * result["apply_s"],
                "digest": 1000 * result["verify_s"], "digest_tables": 1000 * result["digest_tables_s"],
                "digest_launch": 1000 * result["digest_launch_s"], "digest_device": 1000 * result["digest_device_s"],
                "record": 1000 * result["record_s"], "loader": 1000 * result["loader_s"], "continue": continue_ms,
                **{name[:-2]: 1000 * result[name] for name in ("begin_s", "end_s") if name in result},
            },
        }  # fmt: skip
        proven = asyncio.create_task(self._readback(version, times[-1])) if result["readback"] else None
        if meter:
            meter.mark()
            meter.resume()
            row |= await self._felt(meter, times, quiet, staging) if watched else {}
            row["again_s"] = await meter.again(times[0], RECOVERY_S)
            meter.check()
        if proven is not None:
            row |= await proven
        return row

    async def _felt(self, meter: Meter, times: list[float], quiet: float, staging: float) -> dict[str, float | None]:
        """What the streams felt of an update."""
        usual = meter.rate(quiet, staging)
        rates = {"tokens_per_s": usual, "staging_tokens_per_s": meter.rate(staging, times[0])}
        if self.args.recovery:
            rates["recovery_s"] = await meter.recovery(times[0], times[-1], usual, RECOVERY_S)
        return {**rates, "staging_s": times[0] - staging}

    async def _readback(self, version: int, continued: float) -> dict[str, float]:
        found = await asyncio.to_thread(self.subscriber.readback, version)
        return found | {"readback_seen_s": time.monotonic() - continued}

    async def kept(self, mode: str, meter: Meter) -> dict[str, Any]:
        """A version that requests live through, with nothing else running: what it does to their log-probabilities."""
        await meter.drain(self.client.abort_all)
        version = (await self.versions.take())["version"]
        third = (self.args.context - 100) // 3
        async with Kept(self.client.url, TOKEN, min(8, self.args.running), third, third) as kept:
            await kept.begin(least=MARGIN)
            row = await self._bring(version, mode, None)
            kept.updated()
            row |= await kept.compared()
        meter.resume()
        return {"mode": mode, "counted": False, **row}


async def wait_ready(client: EngineClient, server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await client.health():
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("SGLang did not become ready")
        await asyncio.sleep(0.5)
