"""Slots of one engine: a request waits here, not in the engine, until it may have one.

What an engine takes up is prefilled, and decoding stands still meanwhile: for one request nearly as long as for dozens.
An engine with many slots therefore gets its requests in bursts: at least `burst` at once, or what there is when the
first has waited long enough. That is the shorter the emptier the engine is: then a prefill keeps few from decoding.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

LONGEST_WAIT_S = 0.25
"""How long a request with a free slot waits, at an engine that is nearly full, for others to go with it."""


class SlotGate:
    """`limit`: slots that may be taken at once. When it falls, what has a slot keeps it."""

    def __init__(self, limit: int, burst: int = 1):
        self.taken = 0
        self._limit, self._burst = limit, burst
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._admit()

    async def take(self) -> None:
        """Wait for a slot, first come, first served. It is taken when this returns."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # it has been passed over
                    self._waiting.remove(turn)
            else:
                self.free()
            raise

    def free(self) -> None:
        self.taken -= 1
        self._admit()

    def _admit(self) -> None:
        """Give slots away, or see to it that this is done in a while."""
        able = min(len(self._waiting), self._limit - self.taken)
        if able <= 0:
            return
        if able >= self._burst:
            self._give(able)
        elif self._timer is None:
            wait_s = LONGEST_WAIT_S * min(1.0, self.taken / max(1, self._limit))
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._give_what_there_is)

    def _give_what_there_is(self) -> None:
        self._timer = None
        self._give(min(len(self._waiting), self._limit - self.taken))

    def _give(self, count: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while count > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # who waited has not been cancelled
                count -= 1
                self.taken += 1
                turn.set_result(None)
