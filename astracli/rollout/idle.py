"""How much of an engine's idle time falls into a state that comes and goes: held by an evaluation."""

from __future__ import annotations


class IdleWhile:
    """How much of an engine's idle seconds fall into a state that comes and goes."""

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
