"""Streams that load an engine during updates, and requests that live through one.

Streams never end and are counted as their tokens arrive. They begin at staggered lengths, so that their contexts fill
the server evenly and no two end together. One that ends early (aborted by an update) is sent again with as many tokens
behind its prompt as it had generated, which is what the rollout worker does; one that reaches its budget begins anew.
Random tokens take the place of real ones: only their number costs time.

Of requests that live through an update (`retract`, `in_place`): what it does to their log-probabilities. Each has a
long prompt and generates while the update comes. Behind it the server is asked, in one pass over prompt and completion
with nothing cached, what the new weights alone say of the tokens that were drawn behind the update. Where a request
kept old keys, values and states, the two differ by more than decoding differs from a pass over all tokens; how much
that is, requests say that began after the update.
"""

from __future__ import annotations

import asyncio
import itertools
import json
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
        self.first_seen: dict[int, float] = {}
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
                        self.first_seen.setdefault(k, now)
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
        self.first_seen.clear()

    async def again(self, begin: float, limit_s: float) -> float | None:
        """Seconds from `begin` until every stream had brought tokens since `mark`; None: not within `limit_s` of it."""
        while len(self.first_seen) < self._running:
            if time.monotonic() > begin + limit_s:
                return None
            await asyncio.sleep(0.005)
        return max(self.first_seen.values()) - begin

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


MARGIN = 16
"""Tokens behind those that had arrived when the update was over: drawn before, delivered later (every 8th step)."""
RESCORED_AT_ONCE = 4
"""Full logits of these are in memory together."""


class Request:
    """One streamed request."""

    def __init__(self, number: int, prompt: int):
        self.prompt = [3 + (number + 7 * i) % 97 % 60 for i in range(prompt)]
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: dict[str, Any] = {}
        """Why it ended, in the server's words."""
        self.after = 0
        """First token that is surely drawn by the new weights."""

    def take(self, answer: dict[str, Any]) -> None:
        """A chunk. Raises RuntimeError when the server answers with an error, or leaves tokens out."""
        if "meta_info" not in answer:
            raise RuntimeError(f"a request was answered with {json.dumps(answer)[:300]}")
        meta = answer["meta_info"]
        self.finish = meta.get("finish_reason") or {}
        count, logprobs = meta["completion_tokens"], [entry[0] for entry in meta["output_token_logprobs"]]
        try:
            self.tokens = grown(self.tokens, answer["output_ids"], count)
            self.logprobs = grown(self.logprobs, logprobs, count)
        except ValueError as error:
            raise RuntimeError(f"a request's stream has a gap: {error}; finish reason {self.finish}") from None


def grown(known: list[Any], told: list[Any], count: int) -> list[Any]:
    """The `count` that there are in all, when a chunk tells all of them, or those that are new, or (as SGLang of a
    request that it ends) the last once more. Raises ValueError when some are missing."""
    if len(told) >= count:
        return told[:count]
    if len(known) == count:
        return known
    if len(known) + len(told) != count:
        raise ValueError(f"{len(told)} told behind {len(known)} known are not {count}")
    return known + told


class Kept(Streams):
    """`count` requests of `prompt` tokens that generate `new` more."""

    def __init__(self, url: str, token: str, count: int, prompt: int, new: int):
        super().__init__(url, token)
        self._prompt, self._new, self._count = prompt, new, count
        self.requests: list[Request] = []

    async def __aenter__(self) -> Kept:
        return self

    async def begin(self, least: int) -> None:
        """Until each request has `least` tokens."""
        self.requests = [Request(k, self._prompt) for k in range(self._count)]
        self._tasks = [asyncio.create_task(self._stream(request)) for request in self.requests]
        while any(len(request.tokens) < least for request in self.requests):
            self.check()
            await asyncio.sleep(0.005)

    def updated(self) -> None:
        """The update is over."""
        for request in self.requests:
            request.after = len(request.tokens) + MARGIN

    async def compared(self) -> dict[str, float | int | None]:
        """Until all are done: |log-probability as drawn - the same by the weights alone| behind the update."""
        await asyncio.gather(*self._tasks)
        gaps = await self._gaps()
        began, self.requests = self.requests, [Request(k, self._prompt) for k in range(self._count)]
        await asyncio.gather(*(self._stream(request) for request in self.requests))
        fresh = await self._gaps()
        if not gaps:
            raise RuntimeError("every request had ended before the update was over: none was kept through it")
        left = {"kept_requests": len(began), "kept_before": sum(r.after - MARGIN for r in began) / len(began)}
        return {**left, **_figures("kept", gaps), **_figures("fresh", fresh)}

    async def _stream(self, request: Request) -> None:
        params = {"temperature": 1.0, "ignore_eos": True, "max_new_tokens": self._new}
        body = {"input_ids": request.prompt, "sampling_params": params, "stream": True, "return_logprob": True}
        async with self._http.stream("POST", "/generate", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data:") and not line.endswith("[DONE]"):
                    request.take(json.loads(line[5:]))
        if len(request.tokens) != self._new:
            raise RuntimeError(f"a request ended behind {len(request.tokens)} of {self._new} tokens: {request.finish}")

    async def _gaps(self) -> list[float]:
        found: list[float] = []
        for at in range(0, len(self.requests), RESCORED_AT_ONCE):
            some = self.requests[at : at + RESCORED_AT_ONCE]
            for gaps in await asyncio.gather(*(self._rescored(request) for request in some)):
                found += gaps
        return found

    async def _rescored(self, request: Request) -> list[float]:
        """|difference| of each token from `after` on."""
        body = {
            "input_ids": request.prompt + request.tokens, "return_logprob": True,
            "logprob_start_len": len(request.prompt) - 1,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
        }  # fmt: skip
        reply = await self._http.post("/generate", json=body)
        reply.raise_for_status()
        entries = reply.json()["meta_info"]["input_token_logprobs"][1:]  # the first is the prompt's last token
        asked, told = request.tokens, [entry[1] for entry in entries]
        if len(asked) != len(told) or any(b not in (a, 0) for a, b in zip(asked, told, strict=True)):
            # 0: SGLang calls the vocabulary's last token so (logprob_result_processor.py), its log-probability is right
            raise RuntimeError(f"asked about the tokens {asked}, the server's log-probabilities are of {told}")
        pairs = list(zip(request.logprobs, (entry[0] for entry in entries), strict=True))
        return [abs(drawn - alone) for drawn, alone in pairs[request.after :]]


def _figures(name: str, gaps: list[float]) -> dict[str, float | int | None]:
    mean = sum(gaps) / len(gaps) if gaps else None
    return {f"{name}_tokens": len(gaps), f"{name}_mean": mean, f"{name}_max": max(gaps, default=None)}
