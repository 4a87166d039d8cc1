"""What the supervisor knows of its children and what it asks of the hub."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Phase = Literal["starting", "running", "resuming", "finishing", "stopping"]


class Hub(Protocol):
    """What the supervisor asks of the hub. Python calls in this process."""

    def alive(self) -> bool:
        """The hub's server still serves."""

    def request_stop(self) -> None:
        """Answer `stop` to every worker from now on."""

    def release_worker(self, name: str) -> None:
        """A worker died: its leases go back, its engine is down."""

    def pending_evals(self) -> int:
        """Evaluations announced and not done."""


@dataclass
class Status:
    """The last word of one child."""

    state: str = "starting"
    waiting: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    heard: float | None = None
    """Monotonic time of the last heartbeat; None before the first."""
    restarts: int = 0
    started: float = field(default_factory=time.monotonic)

    def words(self) -> str:
        """What it waits for, or its state."""
        if self.waiting:
            return self.waiting if self.waiting.startswith("waiting") else f"waiting for {self.waiting}"
        return self.state if self.heard is not None else "has not reported yet"
