"""`codec.encode` in torch operations, on the device where the tensors lie: only coded bytes go to the host.

A GPU compares, gap-codes and splits into byte planes; the planes are copied to pinned memory, and threads compress them
there. The bytes are those of the numpy path. Operations are the same on every device, which is how they are tested.

Letters: N elements of a range, C changed ones, E long gaps, W bytes of an element.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from astracli.weights import codec, container
from astracli.weights.payload import Coded

_PIECES_AT_ONCE = 16
"""Pieces of one pass on the device: bounds its temporaries to some 50 bytes for each change among 64 M elements."""


def bits_torch(tensor: torch.Tensor) -> torch.Tensor:
    """A flat contiguous tensor as signed integers of its width, sharing memory."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def to_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits -> position in the order of the floats, as the codec has it; signed integers hold the same bits."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) | torch.iinfo(bits.dtype).min)


def from_order(order: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_order`."""
    return order ^ (~(order >> (8 * order.element_size() - 1)) | torch.iinfo(order.dtype).min)


def difference(encoding: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What is stored for changed elements: zigzag ULP differences, XOR, or the new bits; signed integers."""
    if encoding.endswith("-ulp"):
        step = to_order(new) - to_order(old)
        return (step >> (8 * step.element_size() - 1)) ^ (step + step)
    return old ^ new if encoding.endswith("-xor") else new


def coded_pieces(
    base: torch.Tensor, new: torch.Tensor, piece: int, level: int, room: threading.Semaphore
) -> Iterator[Callable[[], Coded]]:
    """The changed pieces of one tensor [N], flat on one device, in order; each compresses when called, in any thread.

    `piece`: elements, a power of two. A pass over the device takes one of `room` until its last piece is compressed.
    """
    old, now, spent = bits_torch(base), bits_torch(new), 0.0
    for start in range(0, len(now), piece * _PIECES_AT_ONCE):
        end = min(len(now), start + piece * _PIECES_AT_ONCE)
        room.acquire()
        begin = time.perf_counter()
        found = _pass(start, old[start:end], now[start:end], piece, level)
        spent += time.perf_counter() - begin
        left = _Countdown(len(found), room.release)
        for work in found:
            yield _timed(work, left, spent)
            spent = 0.0


class _Countdown:
    """Calls `done` once as many pieces have ended as it was made for, well or not."""

    def __init__(self, count: int, done: Callable[[], Any]):
        self._left, self._done, self._lock = count, done, threading.Lock()
        if not count:
            done()

    def one(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._done()


def _timed(work: Callable[[], tuple[int, int, codec.Encoded]], left: _Countdown, diff_s: float) -> Callable[[], Coded]:
    def run() -> Coded:
        begin = time.perf_counter()
        try:
            return Coded(*work(), diff_s, time.perf_counter() - begin)
        finally:
            left.one()

    return run


class _Fetched:
    """Tensors on their way to the host. On a GPU the copies run beside what follows them."""

    def __init__(self, *tensors: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type == "cpu":
            self._host = tensors
            return
        self._host = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        if self._event is not None:
            self._event.synchronize()
        return [host.numpy() for host in self._host]


def _planes(values: torch.Tensor) -> torch.Tensor:
    """[n] integers of W bytes -> uint8 [W, n], lowest byte first."""
    return values.contiguous().view(torch.uint8).view(-1, values.element_size()).T.contiguous()


def _pass(
    start: int, old: torch.Tensor, new: torch.Tensor, piece: int, level: int
) -> list[Callable[[], tuple[int, int, codec.Encoded]]]:
    """The changed pieces of one pass. `start`: of the pass in the local range, a multiple of `piece`."""
    at = torch.nonzero(old != new).view(-1)  # int64 [C]
    if not len(at):
        return []
    ends = torch.searchsorted(at, torch.arange(piece, len(new) + piece, piece, device=at.device))
    before = torch.empty_like(at)  # the change before; for the first of a piece, the last element before the piece
    before[0] = -1
    before[1:] = at[:-1]
    gaps = at - torch.maximum(before, (at & -piece) - 1) - 1
    long_at = torch.nonzero(gaps >= container.ESCAPE).view(-1)
    counts, long_counts = torch.stack([ends, torch.searchsorted(long_at, ends)]).tolist()
    fetched = _Fetched(
        gaps.clamp(max=container.ESCAPE).to(torch.uint8),
        gaps[long_at].to(torch.int32),
        _planes(difference("gap-ulp", old[at], new[at])),
    )
    found = []
    for k, (low, high) in enumerate(zip([0, *counts], counts, strict=False)):
        if low == high:
            continue
        first, last = k * piece, min(len(new), (k + 1) * piece)
        encoding, values = _other(old[first:last], new[first:last], at[low:high] - first, level)
        long = slice(long_counts[k - 1] if k else 0, long_counts[k])
        where = (start + first, last - first)
        found.append(_compressing(fetched, slice(low, high), long, encoding, values, where, level))
    return found


def _other(old: torch.Tensor, new: torch.Tensor, at: torch.Tensor, level: int) -> tuple[str, _Fetched | None]:
    """A piece's encoding, and its value planes when they are not those of `gap-ulp`."""
    names = codec.candidates(new.element_size(), len(at), len(new))
    if len(names) == 1:
        return names[0], None
    ranges = codec.windows(len(new)) or [(0, len(new))]
    samples = [torch.cat([bits[low:high] for low, high in ranges]).cpu().numpy() for bits in (old, new)]
    unsigned = np.dtype(f"<u{new.element_size()}")
    encoding = codec.smallest(names, samples[0].view(unsigned), samples[1].view(unsigned), level)
    if encoding == "gap-ulp":
        return encoding, None
    if encoding.startswith("gap-"):
        old, new = old[at], new[at]
    return encoding, _Fetched(_planes(difference(encoding, old, new)))


def _compressing(
    fetched: _Fetched, changes: slice, long: slice, encoding: str, other: _Fetched | None, where: tuple[int, int],
    level: int,
) -> Callable[[], tuple[int, int, codec.Encoded]]:  # fmt: skip
    def work() -> tuple[int, int, codec.Encoded]:
        short, long_gaps, planes = fetched.arrays()
        values = [plane[changes] for plane in planes] if other is None else list(other.arrays()[0])
        dense = encoding.startswith("dense-")
        near, far = (None, None) if dense else (short[changes], long_gaps[long])
        count = changes.stop - changes.start
        payload = container.assemble(encoding, where[1], count, near, far, values, level)
        return *where, codec.Encoded(encoding, count, payload)

    return work
