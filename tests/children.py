"""Processes that the code under test has started, seen from outside."""

from __future__ import annotations

import psutil
import warm


def children(*, recursive: bool = False) -> set[psutil.Process]:
    """Those of this process that run or wait to be reaped, without what `warm` keeps for the next test."""
    return {child for child in psutil.Process().children(recursive) if not warm.is_server(child.pid)}


def kill(child: psutil.Process) -> None:
    """kill -9; back when it is dead. Whoever started it still has to reap it."""
    child.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        pass
