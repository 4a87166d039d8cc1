"""A stand-in for an SGLang server, in a process of its own: SGLang's routes, made-up tokens, no model, no GPU.

It keeps SGLang's order of work: one batch at a time; requests that wait and find a slot are prefilled together before
the next decode step, and decoding stands still meanwhile; a decode step gives every running request one token. A step
takes `step_ms` + `request_us` for each running request, a prefill `prefill_ms` whatever it holds. The defaults are what
a log of SGLang 0.5.17 shows for a model of 0.5 B on an H200. A completion ends where a log-normal law of its seed says.
Answers have the shape and the size of SGLang's, with log-probabilities.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST = 4096
"""Tokens of the longest answer."""


@dataclass
class Law:
    """Tokens of the completion with a seed."""

    median: float
    sigma: float
    most: int

    def __call__(self, seed: int) -> int:
        drawn = random.Random(seed).lognormvariate(math.log(self.median), self.sigma)
        return min(max(1, round(drawn)), self.most)


class Texts:
    """Answers of every length: slices of one long answer."""

    def __init__(self, vocabulary: int):
        draw = random.Random(0)
        ids = [draw.randrange(3, vocabulary) for _ in range(LONGEST)]
        self._ids, self._id_ends = _joined([str(token) for token in ids])
        logprobs = [f"[{-draw.expovariate(3.0)!r},{token},null]" for token in ids]
        self._logprobs, self._logprob_ends = _joined(logprobs)

    def answer(self, length: int, reason: str, version: str, latency_s: float) -> bytes:
        ids, logprobs = self._ids[: self._id_ends[length]], self._logprobs[: self._logprob_ends[length]]
        meta = (
            f'"meta_info":{{"id":"0123456789abcdef0123456789abcdef","finish_reason":{{"type":"{reason}"}},'
            f'"prompt_tokens":100,"weight_version":"{version}","completion_tokens":{length},"cached_tokens":0,'
            f'"e2e_latency":{latency_s!r},"output_token_logprobs":['
        )
        return b'[{"text":"","output_ids":[' + ids + b"]," + meta.encode() + logprobs + b"]}}]"


def _joined(parts: list[str]) -> tuple[bytes, list[int]]:
    """(parts with commas between them, where the first n of them end)"""
    ends, place = [0], 0
    for part in parts:
        place += len(part) + 1
        ends.append(place - 1)
    return ",".join(parts).encode(), ends


@dataclass(eq=False)
class Running:
    """A request."""

    length: int
    answer: Any
    """Gets (tokens, reason)."""
    arrived: float
    ends_at: int = 0
    """Decode step with which it ends."""
    begun_at: int = 0
    ended: bool = False


@dataclass
class Scheduler:
    """The engine's loop. `stats` are sums over its seconds."""

    slots: int
    step_s: float
    request_s: float
    prefill_s: float
    paused: bool = False
    step: int = 0
    waiting: deque[Running] = field(default_factory=deque)
    running: int = 0
    _ends: list[tuple[int, int, Running]] = field(default_factory=list)
    _count: int = 0
    stats: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("seconds", "busy", "waiting", "tokens", "finished", "steps", "prefills", "prefilled", "late"), 0.0
        )
    )

    def submit(self, request: Running) -> None:
        self.waiting.append(request)

    def admit(self) -> int:
        """Requests that get a slot now."""
        taken = min(len(self.waiting), self.slots - self.running)
        for _ in range(taken):
            request = self.waiting.popleft()
            request.begun_at, request.ends_at = self.step, self.step + request.length
            self._count += 1
            heapq.heappush(self._ends, (request.ends_at, self._count, request))
        self.running += taken
        return taken

    def turn(self) -> tuple[float, list[Running]]:
        """One batch: (how long it takes, requests that end with it)."""
        if self.paused:
            return 0.0, []
        if taken := self.admit():
            self.stats["prefills"] += 1
            self.stats["prefilled"] += taken
            return self.prefill_s, []
        if not self.running:
            return 0.0, []
        self.step += 1
        self.stats["steps"] += 1
        self.stats["tokens"] += self.running
        took, ended = self.step_s + self.request_s * self.running, []
        while self._ends and self._ends[0][0] <= self.step:
            ended.append(heapq.heappop(self._ends)[2])
        self.running -= len(ended)
        self.stats["finished"] += len(ended)
        return took, ended

    def account(self, seconds: float, running: int) -> None:
        self.stats["seconds"] += seconds
        self.stats["busy"] += seconds * running / self.slots
        self.stats["waiting"] += seconds * len(self.waiting)

    def abort(self) -> list[Running]:
        """Every request ends with what it has."""
        there = [*self.waiting, *(request for _, _, request in self._ends)]
        self.waiting.clear()
        self._ends.clear()
        self.running = 0
        return there

    async def run(self) -> None:
        """In real time: a turn that comes late is not made up for, as on a real engine."""
        due = time.perf_counter()
        while True:
            running = self.running
            took, ended = self.turn()
            now = time.perf_counter()
            if not took:
                await asyncio.sleep(0.001)
                self.account(time.perf_counter() - now, 0)
                due = time.perf_counter()
                continue
            due = max(due + took, now)
            await asyncio.sleep(due - now)
            late = time.perf_counter() - due
            if late > 0.002:
                self.stats["late"] += late
                due += late
            self.account(time.perf_counter() - now, max(running, self.running))
            for request in ended:
                request.answer(request.length, "length")


def own_rate(scheduler: Scheduler, law: Law, burst: int, seconds: float = 60.0) -> dict[str, float]:
    """What the engine makes by itself: no client, requests without end, given to it `burst` at once (1: the queue is
    never empty, so that each slot is filled when it is free)."""
    clock, seed = 0.0, 0
    while clock < seconds:
        if scheduler.slots - scheduler.running >= burst:
            for _ in range(scheduler.slots - scheduler.running - len(scheduler.waiting)):
                scheduler.submit(Running(law(seed), None, 0.0))
                seed += 1
        running = scheduler.running
        took, _ = scheduler.turn()
        clock += took
        scheduler.account(took, max(running, scheduler.running))
    stats = scheduler.stats
    return {"tokens_per_s": stats["tokens"] / clock, "slots_busy": stats["busy"] / clock}


class Server(asyncio.Protocol):
    """One connection: HTTP/1.1, a request at a time."""

    def __init__(self, engine: Engine):
        self._engine, self._data = engine, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        at = lower.find(b"content-length:")
        length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(rest) < length:
            return
        self._data = rest[length:]
        method, path, _ = head.split(b" ", 2)
        self._engine.asked(method.decode(), path.decode(), rest[:length], self.reply)

    def reply(self, body: bytes, status: int = 200) -> None:
        if not self._transport.is_closing():
            head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self._transport.write(head.encode() + body)


class Engine:
    def __init__(self, args: argparse.Namespace):
        self.scheduler = Scheduler(args.slots, args.step_ms / 1e3, args.request_us / 1e6, args.prefill_ms / 1e3)
        self._law, self._texts = Law(args.median, args.sigma, args.new_tokens), Texts(args.vocabulary)
        self._version, self._stage = "0", args.stage_dir

    def asked(self, method: str, path: str, body: bytes, reply: Any) -> None:
        document = json.loads(body) if body else {}
        if path == "/generate":
            self._generate(document, reply)
        elif path == "/abort_request":
            for request in self.scheduler.abort():
                request.answer(max(0, self.scheduler.step - request.begun_at), "abort")
            reply(b"{}")
        elif path in ("/pause_generation", "/continue_generation"):
            self.scheduler.paused = path == "/pause_generation"
            reply(b"{}")
        elif path == "/update_weights_from_tensor":
            # the label of the version comes after it
            version = json.loads((self._stage / "wanted.json").read_text()) if self._stage else 0
            if self._stage:
                (self._stage / "result.json").write_text(json.dumps({"ok": True, "message": "", "version": version}))
            reply(b'{"success":true,"message":"Success"}')
        elif path == "/update_weight_version":
            self._version = str(document["new_version"])
            reply(b'{"success":true}')
        elif path == "/stats":
            reply(json.dumps(self.scheduler.stats | {"running": self.scheduler.running}).encode())
        elif path == "/model_info":
            reply(json.dumps({"weight_version": self._version, "model_path": ""}).encode())
        elif path == "/health_generate":
            reply(b"{}")
        else:
            reply(b'{"error":{"message":"no such route"}}', 404)

    def _generate(self, document: dict[str, Any], reply: Any) -> None:
        (sampling,) = document["sampling_params"]
        arrived = time.perf_counter()

        def answer(length: int, reason: str) -> None:
            reply(self._texts.answer(length, reason, self._version, time.perf_counter() - arrived))

        length = min(self._law(sampling["sampling_seed"]), sampling["max_new_tokens"])
        self.scheduler.submit(Running(length, answer, arrived))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--step-ms", type=float, default=1.1, help="of a decode step")
    parser.add_argument("--request-us", type=float, default=8.5, help="more of a step for each running request")
    parser.add_argument("--prefill-ms", type=float, default=20.0)
    parser.add_argument("--median", type=float, default=190.0, help="of a completion's tokens")
    parser.add_argument("--sigma", type=float, default=0.75, help="of the logarithm of tokens")
    parser.add_argument("--new-tokens", type=int, default=1024, help="at most")
    parser.add_argument("--vocabulary", type=int, default=90)


async def serve(args: argparse.Namespace) -> None:
    engine = Engine(args)
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Server(engine), "127.0.0.1", args.port, backlog=4096)
    await engine.scheduler.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stage-dir", type=Path)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
