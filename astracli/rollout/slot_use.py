"""How many of a worker's samples one engine has to finish, and how full its slots are over time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Seconds(NamedTuple):
    """Since the beginning."""

    all: float
    idle: float
    """Without a sample: the hub granted none."""
    busy: float
    """Weighted by the share of slots that had a request of this worker."""


class SlotUse:
    """Counts samples, and adds up time. `clock` returns monotonic seconds."""

    def __init__(self, slots: int = 1, clock: Callable[[], float] = time.monotonic):
        self.slots = slots
        """Requests that the engine decodes at once."""
        self.outstanding = 0
        """Samples that have not ended: their requests are at the engine, or wait to be sent."""
        self.sent = 0
        """Requests at the engine; those beyond its slots wait there."""
        self._clock = clock
        self._begun = self._then = clock()
        self._idle_s = self._busy_s = 0.0

    def change(self, *, outstanding: int = 0, sent: int = 0) -> None:
        """So many more, or fewer."""
        _, self._idle_s, self._busy_s = self.seconds()
        self._then = self._clock()
        self.outstanding += outstanding
        self.sent += sent
        assert self.outstanding >= 0 and self.sent >= 0

    def seconds(self) -> Seconds:
        now = self._clock()
        passed = now - self._then
        busy = min(self.sent, self.slots) / self.slots
        return Seconds(now - self._begun, self._idle_s + passed * (not self.outstanding), self._busy_s + passed * busy)
