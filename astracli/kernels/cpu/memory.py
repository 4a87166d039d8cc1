"""What a process that computes on a CPU does with memory that it has freed, and how much its matrix products keep.

A tensor of a few hundred KB costs more to map and fault in than to fill, so freed memory stays in the process. Two
things keep that bounded when the shapes of tensors change from step to step: oneDNN keeps a few of its compiled
products instead of a thousand, and what lies free is given back to the system now and then.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 30
PRODUCTS = 64
"""Compiled products that oneDNN keeps, and torch beside it. Each shape is one, takes 0.1 to 0.6 MB, and is compiled in
0.3 ms; by default both keep 1024. More than the products of one training step or of ten decoding steps pays nothing:
lengths and numbers of rows hardly ever come back before their product is dropped."""
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN and of torch; a value of the user's is kept."""


def _libc(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def bound_memory() -> None:
    """For a process that is to compute on a CPU, before its first product."""
    keep_freed_memory()
    for name in CAPACITIES:
        os.environ.setdefault(name, str(PRODUCTS))


def keep_freed_memory() -> bool:
    """Ask glibc to serve allocations up to 1 GiB from its heap and not to give the heap back. Whether it agreed.

    By default every allocation over 128 KiB is a fresh mapping whose pages fault in one by one. Other C libraries have
    no such switch; nothing is changed there.
    """
    mallopt = _libc("mallopt")
    return mallopt is not None and all(mallopt(which, _THRESHOLD) for which in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


class GiveBack:
    """Gives what lies free in the heap back to the system, once in `every` passes.

    Freed memory that no later tensor fits into would otherwise stay resident for good. What the next pass needs is
    faulted in again, so this must stay rare: it takes about as long as touching all of that memory once.
    """

    def __init__(self, every: int):
        self._every = every
        self._since = 0
        self.times = 0

    def passed(self, passes: int = 1) -> None:
        """So many passes are over."""
        self._since += passes
        if self._since >= self._every:
            self._since = 0
            self.times += 1
            give_back()


def give_back() -> bool:
    """Give whole pages that are free in glibc's heaps back to the system. False where there is no such call."""
    trim = _libc("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True
