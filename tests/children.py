"""Processes that the code under test has started, seen from outside."""

from __future__ import annotations

import psutil


def children() -> set[psutil.Process]:
    """Those of this process that run or wait to be reaped."""
    return set(psutil.Process().children())


def kill(child: psutil.Process) -> None:
    """kill -9; back when it is dead. Whoever started it still has to reap it."""
    child.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        pass
