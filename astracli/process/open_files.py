"""The limit on open files of this process (`ulimit -n`): raised where it may be, and what a server may use of it."""

from __future__ import annotations

import os
import resource
from contextlib import suppress

OPEN_FILES = 4096
"""Soft limit that a process of a run wants; the usual default is 1024."""
RESERVED = 128
"""Descriptors for everything that is not a connection to a server: files, databases, children."""


def raise_open_files(wanted: int = OPEN_FILES) -> int:
    """Raise the soft limit to `wanted`, as far as the hard limit allows; the soft limit then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    goal = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < goal:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
            return goal
    return soft


def spare() -> int:
    """Descriptors that are free beside `RESERVED`, or half of what is free where the limit is very low."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return OPEN_FILES
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    free = soft - used
    return free - RESERVED if free > 2 * RESERVED else free // 2
