"""A process of another host, as its agent tells it: what it wrote lies in the run directory, its end is heard of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from astracli.process.children import last_lines
from astracli.process.worker import LOST_EXIT


@dataclass(eq=False)
class RemoteProcess:
    """`launcher.Started` on another host, as its agent tells it."""

    name: str
    log: Path
    host: str
    start: int
    _lost: Callable[[], bool]
    _stacks: Callable[[], None]
    _log_start: int = 0
    written: int = 0
    """Bytes of what it wrote that are in `log`."""
    code: int | None = None
    wrote: float = field(default_factory=time.time)

    def exited(self) -> bool:
        return self.code is not None or self._lost()

    def exit_code(self) -> int:
        return LOST_EXIT if self.code is None else self.code

    def last_lines(self, count: int = 20) -> list[str]:
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - 64 * 1024))
                return last_lines(log, count)
        except OSError:
            return []

    def log_time(self) -> float:
        return self.wrote

    def print_stacks(self) -> None:
        self._stacks()
