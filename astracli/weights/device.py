"""`codec.encode` in torch operations, on the GPU where the tensors lie: only coded bytes go to the host.

The GPU compares, gap-codes and splits into byte planes; the planes are copied to pinned memory, and threads compress
them there. The bytes are those of the numpy path. Operations are the same on every device, so that a CPU can test them.

Whoever asks a GPU how many values changed stands still until it has done everything before, and where an engine
generates on it too, gives his turn away. So tensors are compared many at a time (a `_Pass`), their counts come back
behind the work, and some passes are asked for ahead of the one whose counts are read.

Letters: N elements of a pass, C changed ones, P pieces of it, E long gaps, W bytes of an element.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from astracli.training.upload import upload
from astracli.weights import codec, container
from astracli.weights.payload import Bits, Coded

_PIECES_AT_ONCE = 16
"""Pieces of one pass on the device: bounds its temporaries to some 50 bytes for each change among 64 M elements."""
_AHEAD = 4
"""Passes that are compared before the counts of the first of them are read: a byte an element each."""


def bits_torch(tensor: torch.Tensor) -> torch.Tensor:
    """A flat contiguous tensor as signed integers of its width, sharing memory."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def to_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits -> position in the order of the floats, as the codec has it; signed integers hold the same bits."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) | torch.iinfo(bits.dtype).min)


def from_order(order: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_order`."""
    return order ^ (~(order >> (8 * order.element_size() - 1)) | torch.iinfo(order.dtype).min)


class _Range(NamedTuple):
    """Elements [start, start + length) of one tensor, at elements [at, at + length) of its pass."""

    name: str
    start: int
    at: int
    old: torch.Tensor
    new: torch.Tensor


class _Piece(NamedTuple):
    range: _Range
    first: int
    """In the pass."""
    end: int

    @property
    def place(self) -> tuple[int, int]:
        """Start in the tensor's local range, and length."""
        return self.range.start + self.first - self.range.at, self.end - self.first

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and new, views on the device."""
        low, high = self.first - self.range.at, self.end - self.range.at
        return self.range.old[low:high], self.range.new[low:high]


def coded_pieces(
    tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], piece: int, level: int, room: threading.Semaphore
) -> Iterator[tuple[str, Callable[[], Coded]]]:
    """(name, work) for every changed piece of (name, base, new), in order; the work compresses, in any thread.

    `base` and `new`: flat, of one length and dtype; `new` on the device where all is compared, `base` anywhere.
    `piece`: elements, a power of two. What a pass brings to the host takes one of `room` until its last piece is
    compressed.
    """
    ahead: deque[_Pass] = deque()
    clock = _Clock()
    for ranges in _passes(tensors, piece):
        ahead.append(_Pass(ranges, piece))
        if len(ahead) > _AHEAD:
            yield from _coded(ahead.popleft(), level, room, clock)
    while ahead:
        yield from _coded(ahead.popleft(), level, room, clock)


def _passes(tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], piece: int) -> Iterator[list[_Range]]:
    """Neighbouring tensors of at most `_PIECES_AT_ONCE` pieces of elements together; one is only cut between pieces."""
    found: list[_Range] = []
    at, most = 0, piece * _PIECES_AT_ONCE
    for name, base, tensor in tensors:
        old, new = bits_torch(base.to(tensor.device)), bits_torch(tensor)
        start = 0
        while start < len(new):
            length = len(new) - start
            if length > most - at:
                length = (most - at) // piece * piece
            if length:
                found.append(_Range(name, start, at, old[start : start + length], new[start : start + length]))
                start, at = start + length, at + length
            else:
                yield found
                found, at = [], 0
    if found:
        yield found


class _Pass:
    """Which elements of some ranges changed. Made without waiting for the device; `found` waits for the counts."""

    def __init__(self, ranges: list[_Range], piece: int):
        last = ranges[-1]
        self.device = last.new.device
        self.ranges = ranges
        self.pieces = [
            _Piece(r, r.at + low, r.at + min(low + piece, len(r.new)))
            for r in ranges
            for low in range(0, len(r.new), piece)
        ]
        self.changed = torch.empty(last.at + len(last.new), dtype=torch.bool, device=self.device)
        for r in ranges:
            torch.ne(r.old, r.new, out=self.changed[r.at : r.at + len(r.new)])
        self.last = upload(np.asarray([p.end - 1 for p in self.pieces], np.int64), self.device)
        self._counts = _Fetched(_up_to(self.changed, self.last))

    def counts(self) -> list[int]:
        """Changed elements up to the end of each piece, P numbers."""
        found: list[int] = self._counts.arrays()[0].tolist()
        return found


def _up_to(flags: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """int32 [P]: how many of the first elements are set, each of the positions `last` included."""
    return torch.cumsum(flags, 0, dtype=torch.int32)[last]


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


class _Planes:
    """Gaps and ULP differences of all changes of a pass, on their way to the host."""

    def __init__(self, found: _Pass, pieces: list[_Piece], bounds: list[tuple[int, int]]):
        """`bounds`: of each of the changed `pieces`, its changes [low, high) among those of the pass."""
        total = bounds[-1][1]
        at = torch.nonzero_static(found.changed, size=total).view(-1)  # int64 [C]
        first = np.asarray([(low, piece.first - 1) for (low, _), piece in zip(bounds, pieces, strict=True)], np.int64)
        low, edge = upload(np.ascontiguousarray(first.T), at.device)
        before = torch.empty_like(at)  # the change before; for the first of a piece, the last element before the piece
        before[1:] = at[:-1]
        before[low] = edge
        gaps = at - before - 1
        long = gaps >= container.ESCAPE
        high = upload(np.asarray([high - 1 for _, high in bounds], np.int64), at.device)
        most = min(total, len(found.changed) // (container.ESCAPE + 1))  # each takes that many elements
        long_at = torch.nonzero_static(long, size=most, fill_value=0).view(-1)
        values = _values(found, at, pieces, bounds)
        short = gaps.clamp(max=container.ESCAPE).to(torch.uint8)
        self._fetched = _Fetched(short, gaps[long_at].to(torch.int32), _up_to(long, high), _bytes(values))
        self._bounds = bounds

    def piece(self, number: int) -> tuple[Bits, Bits, list[Bits]]:
        """uint8 gaps, int32 long gaps and the byte planes of the values of one changed piece; waits for the copy."""
        short, long, up_to, planes = self._fetched.arrays()
        changes = slice(*self._bounds[number])
        far = slice(int(up_to[number - 1]) if number else 0, int(up_to[number]))
        return short[changes], long[far], [plane[changes] for plane in planes]


def _values(found: _Pass, at: torch.Tensor, pieces: list[_Piece], bounds: list[tuple[int, int]]) -> torch.Tensor:
    """int16 [C]: zigzag ULP differences at the changes `at`. Those of wider elements are left as they happen to be."""
    old, new = (torch.empty(len(at), dtype=torch.int16, device=at.device) for _ in range(2))
    spans: dict[int, tuple[_Range, int, int]] = {}  # by the range's place: a tensor's changed pieces are neighbours
    for piece, (low, high) in zip(pieces, bounds, strict=True):
        found_at = piece.range.at
        spans[found_at] = (piece.range, spans[found_at][1] if found_at in spans else low, high)
    for tensor, low, high in spans.values():
        if tensor.new.element_size() == 2:
            index = at[low:high] - tensor.at
            torch.index_select(tensor.old, 0, index, out=old[low:high])
            torch.index_select(tensor.new, 0, index, out=new[low:high])
    step = to_order(new) - to_order(old)
    return (step >> 15) ^ (step + step)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """[n] integers of W bytes -> uint8 [W, n], lowest byte first."""
    return values.view(torch.uint8).view(-1, values.element_size()).T.contiguous()


def _coded(
    found: _Pass, level: int, room: threading.Semaphore, clock: _Clock
) -> Iterator[tuple[str, Callable[[], Coded]]]:
    """The works of one pass. Everything is asked of the device at once; the works wait for what comes of it."""
    counts = [0, *found.counts()]
    changed = [k for k in range(len(found.pieces)) if counts[k + 1] > counts[k]]
    if not changed:
        return
    clock.stop()
    room.acquire()
    clock.go()
    pieces = [found.pieces[k] for k in changed]
    bounds = [(counts[k], counts[k + 1]) for k in changed]
    names = [
        codec.candidates(p.range.new.element_size(), b - a, p.place[1])
        for p, (a, b) in zip(pieces, bounds, strict=True)
    ]
    planes = _Planes(found, pieces, bounds) if ["gap-ulp"] in names else None
    left = _Countdown(len(pieces), room.release)
    for number, piece in enumerate(pieces):
        work: Callable[[], codec.Encoded]
        if planes is not None and names[number] == ["gap-ulp"]:
            work = partial(_compressed, planes, number, piece.place[1], level)
        else:
            work = partial(_encoded, _Fetched(*piece.bits()), level)
        clock.stop()
        yield piece.range.name, partial(_timed, work, piece.place, left, clock.lap())
        clock.go()


def _compressed(planes: _Planes, number: int, length: int, level: int) -> codec.Encoded:
    short, long, values = planes.piece(number)
    return codec.Encoded(
        "gap-ulp", len(short), container.assemble("gap-ulp", length, len(short), short, long, values, level)
    )


def _encoded(fetched: _Fetched, level: int) -> codec.Encoded:
    """A piece with a choice of encodings is coded on the host: they are tried on samples, and it is dense, or small."""
    old, new = (bits.view(container.unsigned(bits.itemsize)) for bits in fetched.arrays())
    return codec.encode(old, new, level)


def _timed(work: Callable[[], codec.Encoded], place: tuple[int, int], left: _Countdown, diff_s: float) -> Coded:
    begin = time.perf_counter()
    try:
        return Coded(*place, work(), diff_s, time.perf_counter() - begin)
    finally:
        left.one()


class _Countdown:
    """Calls `done` once as many pieces have ended as it was made for, well or not."""

    def __init__(self, count: int, done: Callable[[], Any]):
        self._left, self._done, self._lock = count, done, threading.Lock()

    def one(self) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._done()


class _Clock:
    """Seconds of the thread that asks, between one piece and the next; waiting for room is none of them."""

    def __init__(self) -> None:
        self._spent, self._since = 0.0, time.perf_counter()

    def stop(self) -> None:
        self._spent += time.perf_counter() - self._since

    def go(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """What was spent since the lap before."""
        spent, self._spent = self._spent, 0.0
        return spent
