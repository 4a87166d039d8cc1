"""One engine as requests see it: a gate, what is outstanding behind it, and which version their tokens bear.

A request waits at the gate, and its result until the weights that made it are proven. Both follow from the state that
`EngineWorker` tells (`weight_sync.py`).
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from astracli.engines.client import CallLost, EngineClient
from astracli.engines.contract import GenRequest, GenResult
from astracli.errors import RunFailed
from astracli.rollout.slot_gate import SlotGate
from astracli.rollout.slot_use import SlotUse
from astracli.rollout.weight_sync import Event, State, WeightSync

Heard = Callable[[int, GenResult, bool], None]
"""Called with a request's place in its call, its result, and whether that may be used before the call returns: the
weights that drew it are proven."""
ABORT_AGAIN_S = 0.2
"""A request that was on its way when all were aborted is caught by the next abort."""
FAILURES_IN_A_ROW = 3
LOST_CALLS = 5
"""How often a call whose connection breaks is made again, to an engine that is there all the while."""


class EngineLost(RunFailed):
    """The engine did not answer; it may come back under the same address. What was asked of it is to be asked again."""


@dataclass(eq=False)
class RequestGate:
    """The requests of this worker to one engine."""

    name: str
    engine: EngineClient

    def __post_init__(self) -> None:
        self.sync = WeightSync()
        self.changed = asyncio.Event()
        """Set whenever a sample has ended."""
        self.tokens = 0
        """Tokens generated for this worker."""
        self.use = SlotUse()
        self.slots = SlotGate(limit=sys.maxsize)
        self._drained = asyncio.Event()
        """Set while no request is under way."""
        self._drained.set()
        self._failures = 0
        """How often in a row the engine was lost."""
        self._last_update = (self.use.seconds(), 0)
        self._counts = {"aborted_samples": 0, "prefilled_again_tokens": 0}
        self._prompts = {"prompt_tokens": 0, "cached_tokens": 0}
        """Of requests whose engine says how much a prefix cache had."""
        self._failed_episodes = 0
        self._redrawn = 0
        self._health: asyncio.Task[bool] | None = None

    @property
    def gate(self) -> asyncio.Event:
        """Set while requests may be sent."""
        return self.sync.gate

    @property
    def version(self) -> int | None:
        """What the engine holds and may serve."""
        return self.sync.version

    async def generate(self, requests: Sequence[GenRequest], heard: Heard | None = None) -> list[GenResult]:
        """Send requests once the gate is open; a result's `version` is the oldest in force during its request.

        `heard` is told of each request's end as it comes. Without it all of them are one call, which waits for no slot.
        Raises EngineLost when the engine is gone, RunFailed when that happens again and again.
        """
        if heard is None or not self.engine.single_requests:
            return await self._ask(requests, heard)

        async def one(place: int) -> GenResult:
            await self.slots.take()
            try:
                (result,) = await self._ask([requests[place]], lambda _, *more: heard(place, *more))
                return result
            finally:
                self.slots.free()

        tasks = [asyncio.create_task(one(place)) for place in range(len(requests))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            if not all(task.done() for task in tasks):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, requests: Sequence[GenRequest], heard: Heard | None) -> list[GenResult]:
        """One call to the engine. What its connection loses, while the engine is there, is drawn again."""
        found: dict[int, GenResult] = {}
        places = list(range(len(requests)))

        def told(number: int, result: GenResult, proven: bool) -> None:
            assert heard is not None
            place = places[number]
            if proven:
                found[place] = result
            heard(place, result, proven)

        for again in range(LOST_CALLS + 1):
            try:
                results = await self._call_once([requests[place] for place in places], told if heard else None)
            except CallLost as error:
                if again == LOST_CALLS or not await self._is_there():
                    self._lose(error)
                    raise EngineLost(error.message, error.hint) from error
                places = [place for place in places if place not in found]
                self._redrawn += len(places)
                print(f"warning: {self.name}: {error.message}; {len(places)} requests are drawn again", file=sys.stderr)
            else:
                found |= dict(zip(places, results, strict=True))
                places = []
            if not places:
                break
        self.tokens += sum(len(result.tokens) for result in found.values())
        return [found[place] for place in range(len(requests))]

    async def _is_there(self) -> bool:
        """Whether the engine answers although a call of it broke. Calls that break at once ask once."""
        if self.sync.state is State.LOST:
            return False
        if self._health is None or self._health.done():
            self._health = asyncio.create_task(self.engine.health())
        try:
            return await asyncio.shield(self._health)
        except RunFailed:
            return False

    async def _call_once(self, requests: Sequence[GenRequest], heard: Heard | None) -> list[GenResult]:
        await self.gate.wait()
        version, voids = self.version, self.sync.voids
        assert version is not None
        left, begun = len(requests), time.monotonic()
        self.use.change(sent=left)
        self._drained.clear()

        def one_ended(place: int, result: GenResult) -> None:
            nonlocal left
            left -= 1
            late_s = 0.0 if result.engine_s is None else max(0.0, time.monotonic() - begun - result.engine_s)
            self.use.change(sent=-1, late_s=late_s)
            if result.cached_tokens is not None:
                self._prompts["prompt_tokens"] += len(requests[place].input_ids)
                self._prompts["cached_tokens"] += result.cached_tokens
            if heard is not None:
                proven = self.sync.proven.is_set() and self.sync.voids == voids
                heard(place, with_oldest(result), proven)

        def with_oldest(result: GenResult) -> GenResult:
            return replace(result, version=min(version, result.version, result.version_start))

        try:
            if heard is None or len(requests) == 1:
                results = await self.engine.generate(requests)
                for place, result in enumerate(results):
                    one_ended(place, result)
            else:
                results = await self.engine.generate(requests, one_ended)
        except CallLost:
            raise
        except RunFailed as error:
            self._lose(error)
            raise EngineLost(error.message, error.hint) from error
        finally:
            self.use.change(sent=-left)
            if not self.use.sent:
                self._drained.set()
        self._failures = 0
        await self.sync.proven.wait()
        if self.sync.voids != voids:
            raise EngineLost(f"{self.name} generated with weights that were not proven to be the trainer's")
        return [with_oldest(result) for result in results]

    def count_aborted(self, samples: int, tokens: int) -> None:
        """For the metrics: samples to be continued, and the prompt and prefix tokens that are prefilled again."""
        self._counts["aborted_samples"] += samples
        self._counts["prefilled_again_tokens"] += tokens

    def count_failed(self, episodes: int) -> None:
        """For the metrics: episodes that their environment has failed."""
        self._failed_episodes += episodes

    def _lose(self, error: RunFailed) -> None:
        if self.sync.state is not State.LOST:
            self._failures += 1
            self.sync.tell(Event.LOSE)
        if self._failures >= FAILURES_IN_A_ROW:
            raise error

    async def _call(self, request: Any) -> Any:
        """Await a control call; an engine that does not answer is EngineLost."""
        try:
            return await request
        except RunFailed as error:
            raise EngineLost(error.message, error.hint) from error

    async def _drain(self) -> None:
        """End every request of this worker's; returns when none is outstanding."""
        while not self._drained.is_set():
            await self._call(self.engine.abort_all())
            try:
                await asyncio.wait_for(self._drained.wait(), ABORT_AGAIN_S)
            except TimeoutError:
                continue

    def usage(self) -> dict[str, Any]:
        """What happened on this engine since the last call, for the metrics: since its last update."""
        now, (then, tokens) = self.use.seconds(), self._last_update
        late_s, self.use.late_s = self.use.late_s / max(1, self.use.answers), 0.0
        self.use.answers = 0
        self._last_update = (now, self.tokens)
        counts: dict[str, float] = dict(self._counts)
        self._counts = dict.fromkeys(self._counts, 0)
        if self._failed_episodes:
            counts["failed_episodes"], self._failed_episodes = self._failed_episodes, 0
        if prompt := self._prompts["prompt_tokens"]:
            counts["prefix_hit_rate"] = self._prompts["cached_tokens"] / prompt
            self._prompts = dict.fromkeys(self._prompts, 0)
        if self._redrawn:
            counts["redrawn_requests"], self._redrawn = self._redrawn, 0
        interval_s = max(1e-9, now.all - then.all)
        rates = {
            "rollout_tokens_per_s": (self.tokens - tokens) / interval_s,
            "slots_busy": (now.busy - then.busy) / interval_s,
            "answer_late_s": late_s,
        }
        seconds = {"interval_s": now.all - then.all, "idle_s": now.idle - then.idle}
        return {"engine": self.name, **rates, **seconds, **counts}
