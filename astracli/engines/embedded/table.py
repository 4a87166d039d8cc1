"""What the engine knows of each running sequence besides its cache: arrays with a row per slot, and the requests.

A decode step touches whole arrays; Python looks at a row only when it starts and when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from astracli.engines.contract import Finish, GenResult
from astracli.engines.embedded import sampling
from astracli.engines.stops import StopStrings

_NO_TOKENS = np.zeros(0, np.int32)
_NO_LOGPROBS = np.zeros(0, np.float32)


@dataclass
class Request:
    """One sequence to generate."""

    rid: str
    prompt: np.ndarray
    """int64 [p]"""
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    draw_offset: int = 0
    """Tokens of this completion that are already part of the prompt."""
    deliver: Callable[[GenResult], None] = lambda completion: None
    """Called once, in the decode thread."""
    stop: StopStrings | None = None
    call: int = 0
    """Requests that arrived together have the same number."""
    version_start: int | None = None
    tokens: np.ndarray = field(default_factory=lambda: _NO_TOKENS)
    """int32: generated before the sequence was retracted"""
    logprobs: np.ndarray = field(default_factory=lambda: _NO_LOGPROBS)

    @property
    def remaining(self) -> int:
        return self.max_new_tokens - len(self.tokens)

    def latest(self, drawn: np.ndarray, count: int) -> list[int]:
        """The last `count` tokens of the completion, of which `drawn` are not in `tokens` yet."""
        before = self.prompt[len(self.prompt) - self.draw_offset :]
        return [int(token) for part in (before, self.tokens, drawn) for token in part[-count:]][-count:]

    def context(self) -> np.ndarray:
        """int64: everything to prefill."""
        return np.concatenate([self.prompt, self.tokens.astype(np.int64)]) if len(self.tokens) else self.prompt

    def completion(self, finish: Finish, version: int) -> GenResult:
        start = version if self.version_start is None else self.version_start
        return GenResult(self.tokens, self.logprobs, finish, version, start, self.rid)


class SlotTable:
    """Per-slot arrays; rows 0..active-1 run. Rows are only ever removed through `remove`."""

    def __init__(self, slots: int):
        self.slots = slots
        self.requests: list[Request] = []
        self.length = np.zeros(slots, np.int64)
        """positions in the cache"""
        self.token = np.zeros(slots, np.int64)
        """drawn, not yet in the cache"""
        self.count = np.zeros(slots, np.int64)
        """tokens drawn since this slot was filled"""
        self.budget = np.zeros(slots, np.int64)
        self.seed = np.zeros(slots, np.uint64)
        self.offset = np.zeros(slots, np.int64)
        """completion position of the first token drawn in this slot"""
        self.temperature = np.ones(slots)
        self.top_p = np.ones(slots)
        self.stops = np.full((slots, 1), -1, np.int64)
        self.out_tokens = np.zeros((slots, 16), np.int32)
        self.out_logprobs = np.zeros((slots, 16), np.float32)

    @property
    def active(self) -> int:
        return len(self.requests)

    def add(self, requests: Sequence[Request], lengths: Sequence[int], version: int) -> slice:
        """Fill the next slots with requests whose prompts (of these lengths) are in the cache; returns their rows."""
        first = self.active
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True), start=first):
            if request.version_start is None:
                request.version_start = version
            self._widen(request)
            self.length[row] = length
            self.count[row] = 0
            self.budget[row] = request.remaining
            self.seed[row] = sampling.seed_bits(request.seed)
            self.offset[row] = request.draw_offset + len(request.tokens)
            self.temperature[row] = request.temperature
            self.top_p[row] = request.top_p
            self.stops[row] = -1
            self.stops[row, : len(request.stop_token_ids)] = request.stop_token_ids
        self.requests.extend(requests)
        return slice(first, self.active)

    def _widen(self, request: Request) -> None:
        stops, budget = len(request.stop_token_ids), request.remaining
        if stops > self.stops.shape[1]:
            self.stops = np.pad(self.stops, ((0, 0), (0, stops - self.stops.shape[1])), constant_values=-1)
        if budget > self.out_tokens.shape[1]:
            extra = ((0, 0), (0, budget - self.out_tokens.shape[1]))
            self.out_tokens = np.pad(self.out_tokens, extra)
            self.out_logprobs = np.pad(self.out_logprobs, extra)

    def draws(self, rows: slice) -> np.ndarray:
        """float64: the uniform draw of each row's next token."""
        return sampling.uniforms(self.seed[rows], self.offset[rows] + self.count[rows])

    def record(self, rows: slice, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Append one token to each of these rows."""
        index = np.arange(rows.start, rows.stop)
        self.out_tokens[index, self.count[rows]] = tokens
        self.out_logprobs[index, self.count[rows]] = logprobs
        self.token[rows] = tokens
        self.count[rows] += 1

    def finished(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Rows that drew a stop token or completed a stop string, rows that used up their budget (int64 each)."""
        stopped = (self.token[rows, None] == self.stops[rows]).any(1)
        for place, request in enumerate(self.requests[rows]):
            if request.stop is not None and not stopped[place]:
                row = rows.start + place
                drawn = self.out_tokens[row, : self.count[row]]
                stopped[place] = request.stop.ends(request.latest(drawn, request.stop.window))
        spent = (self.count[rows] >= self.budget[rows]) & ~stopped
        return np.flatnonzero(stopped) + rows.start, np.flatnonzero(spent) + rows.start

    def collect(self, row: int) -> Request:
        """Move what the row generated into its request, and return it. The row stays until `remove`."""
        request, count = self.requests[row], int(self.count[row])
        request.tokens = np.concatenate([request.tokens, self.out_tokens[row, :count]])
        request.logprobs = np.concatenate([request.logprobs, self.out_logprobs[row, :count]])
        return request

    def remove(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drop rows and close the gaps with the last ones. Returns (to, origin): the moves the cache must follow."""
        gone = np.zeros(self.active, bool)
        gone[rows] = True
        kept = int((~gone).sum())
        to = np.flatnonzero(gone[:kept])
        origin = np.flatnonzero(~gone[kept:]) + kept
        arrays = (self.length, self.token, self.count, self.budget, self.seed, self.offset, self.temperature)
        for array in (*arrays, self.top_p, self.stops, self.out_tokens, self.out_logprobs):
            array[to] = array[origin]
        for hole, mover in zip(to.tolist(), origin.tolist(), strict=True):
            self.requests[hole] = self.requests[mover]
        del self.requests[kept:]
        return to, origin
