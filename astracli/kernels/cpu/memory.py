"""Keep freed memory in the process: a tensor of a few hundred KB costs more to map and fault in than to fill."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 30


def keep_freed_memory() -> bool:
    """Ask glibc to serve allocations up to 1 GiB from its heap and not to give the heap back. Whether it agreed.

    By default every allocation over 128 KiB is a fresh mapping whose pages fault in one by one. Other C libraries have
    no such switch; nothing is changed there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and all(mallopt(which, _THRESHOLD) for which in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
