"""How long to go on asking a server that does not answer: briefly when it is gone, long when it only stands still.

Nobody listens at the address of a process that has ended: connections are refused. A process that was stopped (SIGSTOP,
a debugger, a machine that swaps or was suspended) still has its socket, and the kernel takes connections for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

GONE_S = 10.0
"""Without anybody who listens."""
SILENT_S = 600.0
"""With a server that takes connections and answers none."""


class Patience:
    """With one server, from the first failure on. `clock` returns monotonic seconds."""

    def __init__(self, gone_s: float = GONE_S, silent_s: float = SILENT_S, clock: Callable[[], float] = time.monotonic):
        self._gone_s, self._silent_s = gone_s, silent_s
        self._clock = clock
        self._began: float | None = None
        self._gone_since: float | None = None

    def exhausted(self, error: Exception, ahead_s: float = 0.0) -> float | None:
        """After another failure: the limit in seconds that is over, or will be in `ahead_s`; None: ask again."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        if self._gone_since is not None and now + ahead_s - self._gone_since > self._gone_s:
            return self._gone_s
        return self._silent_s if now + ahead_s - self._began > self._silent_s else None
