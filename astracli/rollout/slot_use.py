"""How many of a worker's samples one engine has to finish, how full its slots are over time, and why they are idle."""

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
    """Weighted by the share of slots in which the engine worked at a request of this worker."""


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
        self.late_s = 0.0
        """How long requests have been under way outside the engine, all together: sending them, and from their end in
        the engine until they were noticed here."""
        self.answers = 0
        self._idle_s = self._busy_s = 0.0

    def change(self, *, outstanding: int = 0, sent: int = 0, late_s: float = 0.0) -> None:
        """So many more, or fewer. `late_s`: how long a request that has ended was not in the engine, of the time that
        it was counted in `sent`."""
        seconds = self.seconds()
        self._idle_s, self._busy_s = seconds.idle, seconds.busy - late_s / self.slots
        self._then = self._clock()
        self.outstanding += outstanding
        self.sent += sent
        self.late_s += late_s
        self.answers += max(0, -sent)
        assert self.outstanding >= 0 and self.sent >= 0

    def seconds(self) -> Seconds:
        now = self._clock()
        passed = now - self._then
        busy = min(self.sent, self.slots) / self.slots
        return Seconds(
            now - self._begun,
            self._idle_s + passed * (not self.outstanding),
            self._busy_s + passed * busy,
        )


class IdleWhile:
    """How much of an engine's idle seconds fall into a state that comes and goes: held by an evaluation."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None
        """The idle seconds that there were when the state began; None outside it."""

    def note(self, state: bool, idle_s: float) -> None:
        """The state now, with the engine's idle seconds so far."""
        if self._since is not None:
            self._seconds += idle_s - self._since
        self._since = idle_s if state else None

    def take(self, state: bool, idle_s: float) -> float:
        """The seconds since the last call."""
        self.note(state, idle_s)
        seconds, self._seconds = self._seconds, 0.0
        return seconds
