"""One engine as requests see it: a gate, what is outstanding behind it, and which version their tokens bear.

A request waits at the gate, and its result until the weights that made it are proven. `updates.Lane` opens and closes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from astracli.engines.client import EngineClient, GenRequest, GenResult
from astracli.errors import RunFailed

ABORT_AGAIN_S = 0.2
"""A request that was on its way when all were aborted is caught by the next abort."""
FAILURES_IN_A_ROW = 3


class EngineLost(RunFailed):
    """The engine did not answer; it may come back under the same address. What was asked of it is to be asked again."""


class Gate:
    """The requests of this worker to one engine."""

    def __init__(self, name: str, engine: EngineClient):
        self.name = name
        self.open = asyncio.Event()
        """Set while requests may be sent."""
        self.version: int | None = None
        """What the engine holds; None when that is not known or not to be trusted."""
        self.changed = asyncio.Event()
        """Set whenever a group has left."""
        self.tokens = 0
        """Tokens generated for this worker."""
        self._busy_groups = 0
        self._idle_s, self._idle_since = 0.0, time.monotonic()
        self._engine = engine
        self._proven = asyncio.Event()
        """Set unless a read-back is due: what comes back meanwhile waits for it."""
        self._proven.set()
        self._disproved = 0
        self._outstanding = 0
        self._drained = asyncio.Event()
        self._drained.set()
        self._attached = False
        self._failures = 0
        self._last_update = (time.monotonic(), 0, 0.0)
        self._aborted = {"aborted_samples": 0, "prefilled_again_tokens": 0}

    @property
    def busy_groups(self) -> int:
        """Groups that generate on this engine, or wait at its gate."""
        return self._busy_groups

    @busy_groups.setter
    def busy_groups(self, count: int) -> None:
        self._idle_s, self._idle_since = self.idle_s, time.monotonic()
        self._busy_groups = count

    @property
    def idle_s(self) -> float:
        """How long it has had no group at all, because the hub granted none."""
        return self._idle_s + (0.0 if self._busy_groups else time.monotonic() - self._idle_since)

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """Send requests once the gate is open; a result's `version` is the oldest in force during its request.

        Raises EngineLost when the engine is gone, RunFailed when that happens again and again.
        """
        await self.open.wait()
        version = self.version
        assert version is not None
        disproved = self._disproved
        self._outstanding += 1
        self._drained.clear()
        try:
            results = await self._engine.generate(requests)
        except RunFailed as error:
            self._lose(error)
            raise EngineLost(error.message, error.hint) from error
        finally:
            self._outstanding -= 1
            if not self._outstanding:
                self._drained.set()
        self._failures = 0
        await self._proven.wait()
        if self._disproved != disproved:
            raise EngineLost(f"{self.name} generated with weights that are not the trainer's")
        self.tokens += sum(len(result.tokens) for result in results)
        return [replace(r, version=min(version, r.version, r.version_start)) for r in results]

    def count_aborted(self, samples: int, tokens: int) -> None:
        """For the metrics: samples to be continued, and the prompt and prefix tokens that are prefilled again."""
        self._aborted["aborted_samples"] += samples
        self._aborted["prefilled_again_tokens"] += tokens

    def _lose(self, error: RunFailed) -> None:
        if self._attached:
            self._attached = False
            self._failures += 1
        self.open.clear()
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
            await self._call(self._engine.abort_all())
            try:
                await asyncio.wait_for(self._drained.wait(), ABORT_AGAIN_S)
            except TimeoutError:
                continue

    def _since_last_update(self) -> dict[str, Any]:
        """What happened on this engine since the update before."""
        now, idle_s, (then, tokens, idle_before) = time.monotonic(), self.idle_s, self._last_update
        self._last_update = (now, self.tokens, idle_s)
        counts = dict(self._aborted)
        self._aborted = dict.fromkeys(self._aborted, 0)
        seconds = {"interval_s": now - then, "idle_s": idle_s - idle_before}
        return {"rollout_tokens_per_s": (self.tokens - tokens) / max(1e-9, now - then), **seconds, **counts}
