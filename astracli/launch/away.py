"""Processes whose host has no agent now: they are started again where one comes."""

from __future__ import annotations

import time
from collections.abc import Callable

from astracli.launch.launcher import Process


class Away:
    """By name. Times are of a monotonic clock."""

    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}
        self._engines_seen = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self._processes)

    def waits_for(self, host: str) -> bool:
        """Whether some process of that host is away."""
        return any(process.plan.host == host for process in self._processes.values())

    def add(self, process: Process) -> None:
        """One that has ended with its host's agent."""
        self._processes[process.name] = process.again()

    def back(self, has: Callable[[str | None], bool]) -> list[Process]:
        """Those whose host is there again; they are away no more. `has`: whether a host is there."""
        found = [process for process in self._processes.values() if has(process.plan.host)]
        for process in found:
            del self._processes[process.name]
        return found

    def clear(self) -> None:
        self._processes.clear()

    def too_long(self, engines_left: bool, now: float, limit_s: float) -> str | None:
        """Why the run cannot go on, when it was without any engine for `limit_s`; else None."""
        if engines_left or not self._processes:
            self._engines_seen = now
        if now - self._engines_seen <= limit_s:
            return None
        hosts = ", ".join(sorted({f"`{process.plan.host}`" for process in self._processes.values()}))
        return f"no engine is left, and no agent came on {hosts} for {limit_s:g} s"
