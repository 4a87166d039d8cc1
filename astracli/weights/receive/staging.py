"""Where a full version waits for its pause: its new bits beside the engine, in GPU memory or in pinned host memory.

A thread fills the memory while the engine generates, in chunks and on a stream of its own. In the pause the bits are
copied to where the weights lie: from one place of the GPU to another, or from the host at the link's speed. Which
memory it is, the plan decides (`plan/staging.py`); where there is no room for it after all, the next best serves, and
in the end the file itself.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch

from astracli.weights.device.difference import Event

Where = Literal["gpu", "host", "file"]
NEXT_BEST: dict[Where, Where] = {"gpu": "host", "host": "file"}
WORDS = {
    "host": "full versions wait for their pause in pinned host memory",
    "file": "full versions are copied from their files in the pause",
}
CHUNK = 32 << 20
"""Bytes that are copied, or pinned, in one call: what the engine asks of its GPU meanwhile waits for one at most, about
a millisecond. A multiple of the page size."""
SPARE_BYTES = 1 << 30
"""GPU memory, and host memory, that staging leaves free."""
_ALIGN = 256
"""Bytes: every tensor begins at a multiple, so that a GPU copies it at its full speed."""

Bits = np.ndarray[Any, Any]


@contextlib.contextmanager
def beside(device: torch.device, stream: Any) -> Iterator[None]:
    """Without gradients, on a stream of the device beside the engine's own; None: there is no other."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if stream is not None:
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(stream))
        yield


Copy = tuple[torch.Tensor, Bits]
"""(a flat view of the weights, signed integers; its new bits, of the same width, in a mapped file)"""


@dataclass(eq=False)
class Held:
    """New bits of one version, waiting."""

    where: Where
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(view of the weights, its new bits in the staging memory)"""
    valid: bool = True
    """False: the memory holds something else by now, or was given back."""

    def copy(self) -> None:
        """Asks the device for all copies, in its current stream, and does not wait."""
        assert self.valid, "the staging memory holds other bits by now"
        for view, source in self.pairs:
            view.copy_(source, non_blocking=True)

    def drop(self) -> None:
        self.valid = False
        self.pairs.clear()  # they keep the memory


class Staging:
    """The memory of one engine, for one version at a time."""

    def __init__(self, where: Where, device: torch.device, *, kept: bool):
        """`kept`: for the next version too, else given back once a version has been applied: it takes seconds to pin
        host memory, and with deltas full versions are rare."""
        self._lock = threading.RLock()
        self._where: Where = where
        self._device, self._kept = device, kept
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._there: Where = "file"
        """What `memory` is."""
        self.memory: torch.Tensor | None = None
        """uint8"""
        self._pinned = 0
        """Bytes of it that the driver has pinned, from the start."""
        self._slots: list[torch.Tensor] = []
        """Pinned chunks on the way to a GPU."""
        self._held: Held | None = None

    # ---- beside generation ----

    def hold(self, copies: Sequence[Copy]) -> Held | None:
        """Bring new bits into the memory, in place of those of an earlier version. None: there is no room, and they
        stay in their files."""
        starts = list(accumulate((-(-bits.nbytes // _ALIGN) * _ALIGN for _, bits in copies), initial=0))
        with self._lock, beside(self._device, self._stream):
            self._forget()
            while self._where != "file":
                try:
                    memory = self.room(self._where, max(1, starts[-1]))
                    self._fill(memory, [bits.view(np.uint8) for _, bits in copies], starts)
                    self._held = Held(self._where, list(_pairs(copies, memory, starts)))
                    return self._held
                except (RuntimeError, OSError, MemoryError) as error:  # of torch, of the driver, of the system
                    self.free()
                    self._where = NEXT_BEST[self._where]
                    print(f"warning: from now on {WORDS[self._where]}: {error}", file=sys.stderr, flush=True)
        return None

    def room(self, where: Where, size: int) -> torch.Tensor:
        """The memory, made anew when it is another or too small. Raises MemoryError."""
        if self.memory is not None and self._there == where and len(self.memory) >= size:
            return self.memory[:size]
        self.free()
        free = torch.cuda.mem_get_info(self._device)[0] if where == "gpu" and self._stream else available()
        if free is not None and free < size + SPARE_BYTES:
            words = "the GPU" if where == "gpu" else "the host"
            raise MemoryError(f"{words} has {free / 1e9:.1f} GB free, the version takes {size / 1e9:.1f} GB")
        self._there = where
        self.memory = torch.empty(size, dtype=torch.uint8, device=self._device) if where == "gpu" else _pages(size)
        return self.memory

    def _fill(self, memory: torch.Tensor, sources: Sequence[Bits], starts: Sequence[int]) -> None:
        chunks = [(low, min(low + CHUNK, len(memory))) for low in range(0, len(memory), CHUNK)]
        if self._there == "host":
            for low, high in chunks:
                _gather(memory[low:high].numpy(), low, sources, starts)
                self._pin(memory, high)
            return
        if not self._slots:
            pin = self._stream is not None
            self._slots = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        ready: list[Event | None] = [None, None]
        for k, (low, high) in enumerate(chunks):
            if (before := ready[k % 2]) is not None:
                before.wait()
            slot = self._slots[k % 2][: high - low]
            _gather(slot.numpy(), low, sources, starts)
            memory[low:high].copy_(slot, non_blocking=True)
            ready[k % 2] = Event(self._device)
        if self._stream is not None:
            self._stream.synchronize()

    def _pin(self, memory: torch.Tensor, high: int) -> None:
        """Pin up to byte `high` what is not pinned yet. A call with all of it would keep the driver, and with it the
        engine, for a second and more."""
        if self._stream is not None and high > self._pinned:
            size = high - self._pinned
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr() + self._pinned, size, 0))
            self._pinned = high

    # ---- afterwards ----

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In the pause, around applying a full version: nobody brings another into the memory meanwhile, and at the end
        none waits there any more."""
        with self._lock:
            try:
                yield
            finally:
                self._forget()
                if not self._kept and self._there == "gpu":
                    self.free()
                elif not self._kept and self._there == "host":  # takes the driver a second, in chunks
                    threading.Thread(target=self._free_unused, name="unpin", daemon=True).start()

    def _free_unused(self) -> None:
        with self._lock:
            if self._held is None:
                self.free()

    def leave_gpu(self) -> None:
        """Give all GPU memory back that another process may need now; the engine stands still."""
        with self._lock:
            if self._there == "gpu":
                self.free()
            if self._stream is not None:
                torch.cuda.empty_cache()

    def free(self) -> None:
        """Give the memory back; what it held is lost."""
        with self._lock:
            self._forget()
            memory, self.memory = self.memory, None
            if memory is None:
                return
            address, pinned, self._pinned = memory.data_ptr(), self._pinned, 0
            for low in range(0, pinned, CHUNK):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address + low))
            del memory
            if self._there == "gpu" and self._stream is not None:
                torch.cuda.empty_cache()
            self._there = "file"

    def _forget(self) -> None:
        if self._held is not None:
            self._held.drop()
            self._held = None


def _gather(target: Bits, low: int, sources: Sequence[Bits], starts: Sequence[int]) -> None:
    """Write to `target` what belongs to its bytes of the memory, from byte `low` on."""
    high = low + len(target)
    for k in range(max(0, bisect_right(starts, low) - 1), len(sources)):
        first, last = max(low, starts[k]), min(high, starts[k] + len(sources[k]))
        if starts[k] >= high:
            return
        if first < last:
            np.copyto(target[first - low : last - low], sources[k][first - starts[k] : last - starts[k]])


def _pairs(
    copies: Sequence[Copy], memory: torch.Tensor, starts: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What is copied in the pause, cut where a chunk ends: a copy may not span what was pinned in two calls."""
    for (view, bits), start in zip(copies, starts, strict=False):
        low, end = start, start + bits.nbytes
        while low < end:
            high = min(end, (low // CHUNK + 1) * CHUNK)
            part = slice((low - start) // bits.itemsize, (high - start) // bits.itemsize)
            yield view[part], memory[low:high].view(view.dtype)
            low = high


def _pages(size: int) -> torch.Tensor:
    """uint8 [size] of host memory that no child inherits (a fork would copy what is pinned), in huge pages where the
    system has them: they are pinned several times as fast."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)


def available() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
