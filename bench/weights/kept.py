"""Requests that live through an update (`retract`, `in_place`): what it does to their log-probabilities.

Each has a long prompt and generates while the update comes. Behind it the server is asked, in one pass over prompt and
completion with nothing cached, what the new weights alone say of the tokens that were drawn behind the update. Where a
request kept old keys, values and states, the two differ by more than decoding differs from a pass over all tokens;
how much that is, requests say that began after the update.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from weights.streams import Streams

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
