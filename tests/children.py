"""Processes that the code under test has started, seen from outside."""

from __future__ import annotations

import psutil

OF_THE_TESTS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""What `training_tools.spawn` keeps for the next test; the package starts none."""


def children(*, recursive: bool = False) -> set[psutil.Process]:
    """Those of this process that run or wait to be reaped."""
    return {child for child in psutil.Process().children(recursive) if not _of_the_tests(child)}


def _of_the_tests(child: psutil.Process) -> bool:
    try:
        command = " ".join(child.cmdline())
    except psutil.Error:  # a zombie has none
        return False
    return any(name in command for name in OF_THE_TESTS)


def kill(child: psutil.Process) -> None:
    """kill -9; back when it is dead. Whoever started it still has to reap it."""
    child.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        pass
