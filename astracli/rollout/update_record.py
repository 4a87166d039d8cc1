"""What one weight update of an engine came to: its line in the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from astracli.engines.contract import UpdateReply


@dataclass
class UpdateRecord:
    target: int
    resyncs: int = 0
    readback: bool = False
    """Whether the version that was applied last has to be read back."""
    figures: dict[str, Any] = field(default_factory=dict)
    gap_s: float = 0.0
    _shut_at: float | None = None

    def applied(self, reply: UpdateReply) -> None:
        self.readback = bool(reply.outcome.get("readback"))
        self.figures |= reply.seconds
        if "changed" in reply.outcome:
            self.figures["changed"] = reply.outcome["changed"]

    def gap_begins(self) -> None:
        """No request goes out from here on; the first time counts."""
        if self._shut_at is None:
            self._shut_at = time.monotonic()

    def gap_ends(self) -> None:
        if self._shut_at is not None:
            self.gap_s += time.monotonic() - self._shut_at
            self._shut_at = None

    def record(self) -> dict[str, Any]:
        return {"step": self.target, "resyncs": self.resyncs, "gap_s": self.gap_s, **self.figures}
