"""Engines, a clock and waiting for the hub in simulated time, for `eval_simulation.py`."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from astracli.config.recipe import Recipe
from astracli.engines.contract import GenRequest, GenResult
from astracli.hub.store import HubStore
from astracli.rewards.reward import Grade, GradeItem

STEP_1_S, STEP_64_S = 1 / 237, 64 / 8300
"""Seconds of a decode step with 1 and with 64 requests, as measured (docs/benchmarks.md)."""
NOTHING = np.zeros(0, np.int32), np.zeros(0, np.float32)


class SimulatedClock(selectors.SelectSelector):
    """Waiting costs no time: the clock of the loop moves on instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError(f"everyone waits at {self.now:.1f} s")
        self.now += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = SimulatedClock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


@dataclass
class Setting:
    """What is simulated."""

    recipe: Recipe
    engines: int
    ranks: int
    slots: int
    engine_rate: float
    trainer_rate: float
    """Tokens a second of all ranks together."""
    median: float
    sigma: float
    fetch_s: float
    pause_s: float
    seed: int

    def length(self, draw: random.Random) -> int:
        tokens = draw.lognormvariate(math.log(self.median), self.sigma)
        return max(1, min(self.recipe.rollout.max_new_tokens, round(tokens)))

    def step_s(self, running: int) -> float:
        """Seconds in which each of so many requests gets a token."""
        each = (STEP_64_S - STEP_1_S) / 63
        shape = [STEP_1_S - each + each * n for n in (running, self.slots)]
        return self.slots / self.engine_rate * shape[0] / shape[1]


class Changes:
    """What waits for the hub is asked again whenever the store changed."""

    def __init__(self, store: HubStore):
        self._event = asyncio.Event()
        store.subscribe(self.beat)

    def beat(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ask: Callable[[], Any], ready: Callable[[Any], bool]) -> Any:
        while True:
            event, reply = self._event, ask()
            if ready(reply):
                return reply
            await event.wait()


class Engine:
    """Requests share its speed; a request is served in the order of arrival. `served` tokens each that runs has got."""

    def __init__(self, setting: Setting, name: str):
        self.name, self._setting = name, setting
        self.version = -1
        self.tokens = self.rollout_tokens = 0
        self.slot_s = 0.0
        """Slots that were used, times seconds."""
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._served, self._then, self._number = 0.0, 0.0, 0
        self._stopped_until = 0.0
        self._changed = asyncio.Event()

    async def ask(self, tokens: int) -> None:
        """Until so many tokens are generated."""
        done = asyncio.get_running_loop().create_future()
        self._queue.append((tokens, done))
        self._changed.set()
        await done
        self.tokens += tokens

    def stop_for(self, seconds: float) -> None:
        self._stopped_until = asyncio.get_running_loop().time() + seconds
        self._changed.set()

    def _pass(self) -> None:
        """Bring the work up to now, end what is done, begin what has room."""
        now = asyncio.get_running_loop().time()
        worked = max(0.0, now - max(self._then, self._stopped_until))
        if self._running:
            self._served += worked / self._setting.step_s(len(self._running))
            self.slot_s += worked * len(self._running)
        self._then = now
        while self._running and self._running[0][0] <= self._served + 1e-6:
            heapq.heappop(self._running)[2].set_result(None)
        while self._queue and len(self._running) < self._setting.slots:
            tokens, done = self._queue.popleft()
            self._number += 1
            heapq.heappush(self._running, (self._served + tokens, self._number, done))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            self._pass()
            wait = None
            if self._running:
                left = (self._running[0][0] - self._served) * self._setting.step_s(len(self._running))
                wait = left + max(0.0, self._stopped_until - loop.time())
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                continue

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """For an evaluation."""
        version = self.version
        lengths = [self._setting.length(random.Random(request.seed)) for request in requests]
        await asyncio.gather(*(self.ask(length) for length in lengths))
        return [GenResult(*NOTHING, "stop", self.version, version, "") for _ in requests]

    async def health(self) -> bool:
        return True


class Instantly:
    """Tokenizer and grader of the simulation."""

    chat_template = None
    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [Grade(0.0, "wrong")] * len(items)


class Idle:
    """Samples of one engine that have not ended, and the seconds in which it had none."""

    def __init__(self) -> None:
        self.samples = 0
        self.changed = asyncio.Event()
        self._seconds, self._since = 0.0, 0.0

    @property
    def seconds(self) -> float:
        now = asyncio.get_running_loop().time()
        return self._seconds + (0.0 if self.samples else now - self._since)

    def change(self, more: int) -> None:
        self._seconds = self.seconds
        self._since = asyncio.get_running_loop().time()
        self.samples += more
        self.changed.set()
