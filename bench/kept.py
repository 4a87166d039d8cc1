"""Requests that live through an update (`retract`, `in_place`): what it does to their log-probabilities.

Each has a long prompt and generates while the update comes. Behind it the server is asked, in one pass over prompt and
completion with nothing cached, what the new weights alone say of the tokens that were drawn behind the update. Where a
request kept old keys, values and states, the two differ by more than decoding differs from a pass over all tokens;
how much that is, requests say that began after the update.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from meter import Streams

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
        self._tokens, self._logprobs = Growth(), Growth()
        self.after = 0
        """First token that is surely drawn by the new weights."""

    def take(self, answer: dict[str, Any]) -> None:
        """A chunk; its tokens and their log-probabilities are, each by itself, everything so far or what is new."""
        self.tokens = self._tokens.grown(self.tokens, answer["output_ids"])
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        self.logprobs = self._logprobs.grown(self.logprobs, logprobs)


class Growth:
    """Whether a stream tells all so far or what is new: its second chunk shows it, for the rest of the stream."""

    def __init__(self) -> None:
        self._whole: bool | None = None

    def grown(self, known: list[Any], told: list[Any]) -> list[Any]:
        if known and self._whole is None:
            self._whole = len(told) > len(known) and told[: len(known)] == known
        return told if self._whole else known + told


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
            raise SystemExit("every request had ended before the update was over: none was kept through it")
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
        if [entry[1] for entry in entries] != request.tokens:
            raise SystemExit("the server's log-probabilities are not of the tokens that were asked about")
        if not len(request.logprobs) == len(request.tokens) == self._new:
            counts = f"{len(request.tokens)} tokens with {len(request.logprobs)} log-probabilities, not {self._new}"
            raise SystemExit(f"a request streamed {counts}")
        pairs = list(zip(request.logprobs, (entry[0] for entry in entries), strict=True))
        return [abs(drawn - alone) for drawn, alone in pairs[request.after :]]


def _figures(name: str, gaps: list[float]) -> dict[str, float | int | None]:
    mean = sum(gaps) / len(gaps) if gaps else None
    return {f"{name}_tokens": len(gaps), f"{name}_mean": mean, f"{name}_max": max(gaps, default=None)}
