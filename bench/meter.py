"""Load on an engine during updates, for gpu_sglang_delta.py: one call that is aborted, or streams that are counted.

Every stream that ends early (aborted by an update) is sent again with as many tokens behind its prompt as it had
generated, which is what the rollout worker does. Random tokens take their place: only their number costs time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from astracli.engines.client import EngineClient, GenRequest

BEFORE_S, WINDOW_S, SHARE = 1.0, 0.25, 0.95


class Batch:
    """One call of `running` requests, whose tokens come when it ends."""

    def __init__(self, client: EngineClient, name: str, running: int, budget: int = 1500):
        self._client = client
        self._requests = [
            GenRequest([3 + i % 10, 4, 5], budget, temperature=1.0, rid=f"{name}-{i}") for i in range(running)
        ]
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Batch:
        if self._requests:
            self._task = asyncio.create_task(self._client.generate(self._requests))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None and not self._task.done():
            await self.drain(self._client.abort_all)

    async def drain(self, abort: Callable[[], Awaitable[Any]]) -> None:
        await abort()
        if self._task is not None:
            await self._task

    def resume(self) -> None:
        """Nothing is sent again."""


class Meter:
    """`running` streams of `budget` tokens each; counts what arrives when."""

    def __init__(self, url: str, token: str, running: int, budget: int = 1500):
        self._body: dict[str, Any] = {"stream": True, "sampling_params": {"temperature": 1.0, "ignore_eos": True}}
        self._running, self._budget = running, budget
        limits = httpx.Limits(max_connections=running + 8, max_keepalive_connections=running + 8)
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits, trust_env=False)
        self._tasks: list[asyncio.Task[None]] = []
        self._open, self._idle, self._sent = asyncio.Event(), asyncio.Event(), 0
        self._open.set()
        self.arrived: list[tuple[float, int]] = []
        """(when, tokens)"""

    async def __aenter__(self) -> Meter:
        self._tasks = [asyncio.create_task(self._stream(k)) for k in range(self._running)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def _stream(self, k: int) -> None:
        done = 0
        while done < self._budget:
            prompt = [3 + (k + i) % 10 for i in range(3 + done)]
            params = {**self._body["sampling_params"], "max_new_tokens": self._budget - done}
            body = {**self._body, "input_ids": prompt, "sampling_params": params}
            seen = 0
            await self._open.wait()
            self._sent += 1
            self._idle.clear()
            async with self._http.stream("POST", "/generate", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data:") and not line.endswith("[DONE]"):
                        count = int(json.loads(line[5:])["meta_info"]["completion_tokens"])
                        self.arrived.append((time.monotonic(), count - seen))
                        seen = count
            done += seen
            self._sent -= 1
            if not self._sent:
                self._idle.set()

    async def drain(self, abort: Callable[[], Awaitable[Any]]) -> None:
        """End every stream, and send none before `resume`."""
        self._open.clear()
        await abort()
        await self._idle.wait()

    def resume(self) -> None:
        self._open.set()

    def rate(self, begin: float, end: float) -> float:
        """Tokens a second that arrived in (begin, end]."""
        return sum(count for when, count in self.arrived if begin < when <= end) / (end - begin)

    async def recovery(self, begin: float, end: float, limit_s: float = 30.0) -> dict[str, float]:
        """An update was felt from `begin` to `end` (continue answered): seconds from `begin` until the first quarter of
        a second begins that is at 95 % of the second before, and the tokens a second of that second."""
        before = self.rate(begin - BEFORE_S, begin)
        at = end + WINDOW_S
        while at < end + limit_s:
            at += 0.05
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            if self.rate(at - WINDOW_S, at) >= SHARE * before:
                return {"tokens_per_s": before, "recovery_s": at - WINDOW_S - begin}
        return {"tokens_per_s": before, "recovery_s": float("inf")}
