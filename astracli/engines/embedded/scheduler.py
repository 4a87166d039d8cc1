"""The decode loop: which requests run, and when they start, pause, resume and end.

Other threads use `submit` and `call` only. Everything else happens in the one thread that calls `run_once`.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch

from astracli.engines.contract import Finish, PauseMode
from astracli.engines.embedded import sampling
from astracli.engines.embedded.decoder import Decoder
from astracli.engines.embedded.table import Request, SlotTable
from astracli.errors import RunFailed

T = TypeVar("T")


class Scheduler:
    """Continuous batching over a decoder's slots.

    exclusive_calls: run one call's requests at a time, in their order. A call's result then depends on nothing but the
    call, to the last bit: this is the deterministic mode.
    """

    def __init__(self, decoder: Decoder, *, version: int = 0, exclusive_calls: bool = False):
        self.decoder = decoder
        self.table = SlotTable(decoder.slots)
        self.waiting: deque[Request] = deque()
        self.version = version
        self.paused: PauseMode | None = None
        self.exclusive_calls = exclusive_calls
        self._refill = max(1, decoder.slots // (8 if exclusive_calls else 10))
        """Free slots that are worth a prefill. Deterministic runs keep the number that their bytes depend on."""
        self.tokens_generated = 0
        self.steps = 0
        self.seconds = {"prefill": 0.0, "decode": 0.0, "idle": 0.0}
        """Wall time by what the decode thread did; the rest of its time is control."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    # -- from any thread

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; each one's `deliver` is called once, from the decode thread."""
        self._inbox.put(lambda: self.waiting.extend(requests))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the decode thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    # -- in the decode thread

    def run_once(self, wait_s: float = 0.0) -> bool:
        """Take what has arrived, then run one step. With nothing to run, wait up to `wait_s` for something.

        Returns whether a step was run. Raises RunFailed when the model produces NaN.
        """
        idle = not self._runnable()
        try:
            if idle and wait_s > 0:
                self._await(wait_s)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass
        if not self._runnable():
            return False
        with torch.inference_mode():
            began = time.perf_counter()
            self._admit()
            admitted = time.perf_counter()
            if self.table.active:
                self._decode()
            self.seconds["prefill"] += admitted - began
            self.seconds["decode"] += time.perf_counter() - admitted
        return True

    def _await(self, wait_s: float) -> Callable[[], None]:
        """What arrives next. Raises queue.Empty after `wait_s`."""
        began = time.perf_counter()
        try:
            return self._inbox.get(timeout=wait_s)
        finally:
            self.seconds["idle"] += time.perf_counter() - began

    def _runnable(self) -> bool:
        return self.paused is None and bool(self.table.active or self.waiting)

    def _admit(self) -> None:
        """Prefill waiting requests into free slots; not for every single slot, or prefills would outnumber steps."""
        free = self.table.slots - self.table.active
        eligible = self._eligible()
        if not eligible or free < min(eligible, self._refill):
            return
        new = [self.waiting.popleft() for _ in range(min(free, eligible))]
        contexts = [request.context() for request in new]
        logits = self.decoder.prefill(contexts, self.table.active)
        rows = self.table.add(new, [len(context) for context in contexts], self.version)
        self._draw(rows, logits)

    def _eligible(self) -> int:
        """How many requests at the head of the queue may run now."""
        if not self.exclusive_calls or not self.waiting:
            return len(self.waiting)
        head = self.waiting[0].call
        if self.table.active and self.table.requests[0].call != head:
            return 0
        return sum(request.call == head for request in self.waiting)

    def _decode(self) -> None:
        rows = slice(0, self.table.active)
        logits = self.decoder.decode(self.table.token[rows], self.table.length[rows])
        self.table.length[rows] += 1
        self.steps += 1
        self._draw(rows, logits)

    def _draw(self, rows: slice, logits: torch.Tensor) -> None:
        table = self.table
        tokens, logprobs = sampling.choose(logits, table.temperature[rows], table.top_p[rows], table.draws(rows))
        if np.isnan(logprobs).any():
            raise RunFailed(f"the model produces NaN at weight version {self.version}", "see grad_norm in the metrics")
        table.record(rows, tokens, logprobs)
        self.tokens_generated += len(tokens)
        stopped, spent = table.finished(rows)
        if len(stopped) or len(spent):
            self._end([(stopped, "stop"), (spent, "length")])

    def _end(self, endings: Sequence[tuple[np.ndarray, Finish]]) -> None:
        for rows, finish in endings:
            for row in rows.tolist():
                request = self.table.collect(row)
                request.deliver(request.completion(finish, self.version))
        self._remove(np.concatenate([rows for rows, _ in endings]))

    def _remove(self, rows: np.ndarray) -> None:
        span = int(self.table.length.max(initial=0, where=np.arange(self.table.slots) < self.table.active))
        to, origin = self.table.remove(rows)
        if len(to):
            self.decoder.move(to, origin, span)

    # -- control, in the decode thread (through `call`)

    def abort(self, rids: Collection[str] | None = None) -> int:
        """End these requests, or all; each is delivered with what it has, finish reason `abort`. Returns how many."""
        wanted = None if rids is None else frozenset(rids)
        rows = [i for i, request in enumerate(self.table.requests) if wanted is None or request.rid in wanted]
        gone, stay = deque[Request](), deque[Request]()
        for request in self.waiting:
            (gone if wanted is None or request.rid in wanted else stay).append(request)
        self.waiting = stay
        for request in gone:
            request.deliver(request.completion("abort", self.version))
        if rows:
            self._end([(np.array(rows, np.int64), "abort")])
        return len(rows) + len(gone)

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping. `abort` ends every request, `retract` drops the slots and prefills again later, `in_place`
        keeps the slots. Requests that arrive meanwhile wait."""
        if mode == "abort":
            self.abort()
        elif mode == "retract" and self.table.active:
            rows = np.arange(self.table.active)
            self.waiting.extendleft(reversed([self.table.collect(row) for row in rows.tolist()]))
            self._remove(rows)
        self.paused = mode

    def resume(self) -> None:
        self.paused = None

    def flush(self) -> bool:
        """Drop cached states. False, and nothing done, while sequences hold slots."""
        if self.table.active:
            return False
        self.decoder.cache.clear()
        return True
