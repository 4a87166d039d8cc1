"""Streams that load an engine during updates.

Streams never end and are counted as their tokens arrive. They begin at staggered lengths, so that their contexts fill
the server evenly and no two end together. One that ends early (aborted by an update) is sent again with as many tokens
behind its prompt as it had generated, which is what the rollout worker does; one that reaches its budget begins anew.
Random tokens take the place of real ones: only their number costs time.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

WINDOW_S, SHARE = 0.5, 0.95
COUNT = re.compile(r'"completion_tokens": ?(\d+)')
"""What is wanted of a line. A thousand a second come, each with all tokens so far: read as JSON they would take the
interpreter from the threads whose work is measured."""


class Streams:
    """Requests that a server answers bit by bit, until the end of the block."""

    def __init__(self, url: str, token: str, limits: httpx.Limits | None = None):
        headers = {"Authorization": f"Bearer {token}"}
        kept = limits or httpx.Limits(max_connections=100, max_keepalive_connections=20)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=kept, trust_env=False)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    def check(self) -> None:
        """Raise what ended a stream."""
        for task in self._tasks:
            if task.done():
                task.result()


class Meter(Streams):
    """`running` streams with contexts of up to `budget` tokens; counts what arrives when."""

    def __init__(self, url: str, token: str, running: int, budget: int = 1500):
        self._body: dict[str, Any] = {"stream": True, "sampling_params": {"temperature": 1.0, "ignore_eos": True}}
        self._running, self._budget = running, budget
        super().__init__(url, token, httpx.Limits(max_connections=running + 8, max_keepalive_connections=running + 8))
        self._open, self._idle, self._sent = asyncio.Event(), asyncio.Event(), 0
        self._open.set()
        self._idle.set()
        self.arrived: list[tuple[float, int]] = []
        """(when, tokens)"""
        self._first: dict[int, float] = {}
        """Stream -> when its first tokens since `mark` arrived."""

    async def __aenter__(self) -> Meter:
        self._tasks = [asyncio.create_task(self._stream(k)) for k in range(self._running)]
        return self

    async def _stream(self, k: int) -> None:
        done = k * self._budget // self._running
        while True:
            done = await self._send(k, done)
            done = 0 if done >= self._budget else done

    async def _send(self, k: int, done: int) -> int:
        """One request behind `done` tokens: how many there are then."""
        prompt = [3 + (k + i) % 10 for i in range(3 + done)]
        params = {**self._body["sampling_params"], "max_new_tokens": self._budget - done}
        body = {**self._body, "input_ids": prompt, "sampling_params": params}
        seen = 0
        await self._open.wait()
        self._sent += 1
        self._idle.clear()
        try:
            async with self._http.stream("POST", "/generate", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if found := COUNT.search(line):
                        count = int(found[1])
                        now = time.monotonic()
                        self._first.setdefault(k, now)
                        self.arrived.append((now, count - seen))
                        seen = count
        finally:
            self._sent -= 1
            if not self._sent:
                self._idle.set()
        return done + seen

    async def drain(self, abort: Callable[[], Awaitable[Any]]) -> None:
        """End every stream, and send none before `resume`."""
        self._open.clear()
        while not self._idle.is_set():
            await abort()
            try:
                await asyncio.wait_for(self._idle.wait(), 0.2)  # one that was on its way is caught by the next abort
            except TimeoutError:
                continue

    def resume(self) -> None:
        self._open.set()

    def rate(self, begin: float, end: float) -> float:
        """Tokens a second that arrived in (begin, end]."""
        late = itertools.takewhile(lambda item: item[0] > begin, reversed(self.arrived))
        return sum(count for when, count in late if when <= end) / max(1e-9, end - begin)

    def mark(self) -> None:
        """An update is over: `again` counts from here."""
        self._first.clear()

    async def again(self, begin: float, limit_s: float) -> float | None:
        """Seconds from `begin` until every stream had brought tokens since `mark`; None: not within `limit_s` of it."""
        while len(self._first) < self._running:
            if time.monotonic() > begin + limit_s:
                return None
            await asyncio.sleep(0.005)
        return max(self._first.values()) - begin

    async def recovery(self, begin: float, end: float, before: float, limit_s: float) -> float | None:
        """An update was felt from `begin` to `end` (continue answered): seconds from `begin` until half a second begins
        that is at 95 % of `before` tokens a second; None when that does not come within `limit_s`."""
        at = end + WINDOW_S
        while at < end + limit_s:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if self.rate(at - WINDOW_S, at) >= SHARE * before:
                return at - WINDOW_S - begin
            at += 0.025
        return None
