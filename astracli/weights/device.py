"""The difference between two versions in torch operations, on the GPU where they lie: only coded bytes go to the host.

The GPU compares, gap-codes and splits into byte planes; they are copied into memory from which another process
compresses them (`coder`). The bytes are those of the numpy path. Operations are the same on every device, so that a
CPU can test them.

Whoever asks a GPU how many values changed stands still until it has done everything before, and where an engine
generates on it too, gives his turn away. So tensors are compared many at a time (a pass), their counts come back behind
the work, and some passes are asked for ahead of the one whose counts are read. Beside a training step every operation
that is asked for here delays one of the step's: tensors that lie behind one another are compared as one.

Letters: N elements of a pass, C changed ones, P pieces of it, E long gaps, W bytes of an element.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from astracli.upload import upload
from astracli.weights import codec, container
from astracli.weights.coder import Planes, Work

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


class Event:
    """What was asked of a device so far; to wait for it gives the processor away."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # a spinning thread would hold a processor
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


@dataclass
class Found:
    """The changes of one pass, on their way to the host."""

    work: Work
    """What codes them, once `ready`."""
    names: list[str]
    """Of each of the work's pieces."""
    ready: Event


class _Range(NamedTuple):
    """Elements of one tensor from `start` on, which are elements of a pass from `at` on."""

    name: str
    start: int
    at: int
    old: torch.Tensor
    new: torch.Tensor

    @property
    def end(self) -> int:
        """In the pass."""
        return self.at + len(self.new)


class _Piece(NamedTuple):
    range: _Range
    first: int
    """In the pass."""
    end: int

    @property
    def start(self) -> int:
        """In the tensor's local range."""
        return self.range.start + self.first - self.range.at

    def bits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and new, views on the device."""
        low, high = self.first - self.range.at, self.end - self.range.at
        return bits_torch(self.range.old[low:high]), bits_torch(self.range.new[low:high])


def compared(
    tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], piece: int,
    block: Callable[[int], tuple[int, torch.Tensor]],
) -> Iterator[Found]:  # fmt: skip
    """The changed pieces of (name, base, new), in order, some at a time.

    `base` and `new`: flat, of one length and dtype; `new` on the device where all is compared, `base` anywhere.
    `piece`: elements, a power of two. `block(size)`: host memory for what changed in a pass: number and uint8 [size].
    """
    ahead: deque[_Pass] = deque()
    for ranges in _passes(tensors, piece):
        ahead.append(_Pass(ranges, piece))
        if len(ahead) > _AHEAD and (found := ahead.popleft().found(block)) is not None:
            yield found
    while ahead:
        if (found := ahead.popleft().found(block)) is not None:
            yield found


def _passes(tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], piece: int) -> Iterator[list[_Range]]:
    """Neighbouring tensors of at most `_PIECES_AT_ONCE` pieces of elements together; one is only cut between pieces."""
    found: list[_Range] = []
    at, most = 0, piece * _PIECES_AT_ONCE
    for name, base, new in tensors:
        old, start = base if base.device == new.device else base.to(new.device), 0
        while start < len(new):
            length = len(new) - start
            if length > most - at:
                length = (most - at) // piece * piece
            if length:
                both = (old, new) if length == len(new) else (t[start : start + length] for t in (old, new))
                found.append(_Range(name, start, at, *both))
                start, at = start + length, at + length
            else:
                yield found
                found, at = [], 0
    if found:
        yield found


def _joined(ranges: list[_Range]) -> list[_Range]:
    """The ranges' bits; of those that lie behind one another in memory, in both versions, as one."""
    runs: list[list[_Range]] = []
    for r in ranges:
        if runs and _behind(runs[-1][-1].old, r.old) and _behind(runs[-1][-1].new, r.new):
            runs[-1].append(r)
        else:
            runs.append([r])
    found = []
    for first, *_, last in (run * 2 for run in runs):
        size = (last.end - first.at,)
        old, new = (bits_torch(t.as_strided(size, (1,), t.storage_offset())) for t in (first.old, first.new))
        found.append(first._replace(old=old, new=new))
    return found


def _behind(first: torch.Tensor, second: torch.Tensor) -> bool:
    same = first.dtype == second.dtype and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and first.storage_offset() + len(first) == second.storage_offset()


class _Pass:
    """Which elements of some ranges changed. Made without waiting for the device; `found` waits for the counts."""

    def __init__(self, ranges: list[_Range], piece: int):
        self.device = ranges[0].new.device
        self.runs = _joined(ranges)
        self.pieces = [
            _Piece(r, low, min(low + piece, r.end)) for r in ranges for low in range(r.at, r.end, piece)
        ]  # fmt: skip
        self.changed = torch.empty(ranges[-1].end, dtype=torch.bool, device=self.device)
        for run in self.runs:
            torch.ne(run.old, run.new, out=self.changed[run.at : run.end])
        last = upload(np.asarray([p.end - 1 for p in self.pieces], np.int64), self.device)
        counts = _up_to(self.changed, last)
        self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=self.device.type == "cuda")
        self._counts.copy_(counts, non_blocking=True)
        self._counted = Event(self.device)

    def found(self, block: Callable[[int], tuple[int, torch.Tensor]]) -> Found | None:
        """What changed; None when nothing did. Everything is asked of the device at once."""
        self._counted.wait()
        counts = [0, *self._counts.tolist()]
        changed = [k for k in range(len(self.pieces)) if counts[k + 1] > counts[k]]
        if not changed:
            return None
        pieces = [self.pieces[k] for k in changed]
        bounds = [(counts[k], counts[k + 1]) for k in changed]
        choice = [
            len(codec.candidates(p.range.new.element_size(), high - low, p.end - p.first)) > 1
            for p, (low, high) in zip(pieces, bounds, strict=True)
        ]
        sparse = [p for p, whole in zip(pieces, choice, strict=True) if not whole]
        sizes = [high - low for (low, high), whole in zip(bounds, choice, strict=True) if not whole]
        ends = [0, *accumulate(sizes)]
        for piece, whole in zip(pieces, choice, strict=True):
            if whole and sparse:  # else its changes would stand in the planes
                self.changed[piece.first : piece.end].fill_(False)
        arrays = self._planes(sparse, list(pairwise(ends))) if sparse else []
        planes = len(arrays)
        for piece, whole in zip(pieces, choice, strict=True):
            arrays += piece.bits() if whole else ()
        starts = list(accumulate((-(-array.nbytes // 8) * 8 for array in arrays), initial=0))
        number, memory = block(starts[-1])
        for start, array in zip(starts, arrays, strict=False):
            memory[start : start + array.nbytes].copy_(array.view(-1).view(torch.uint8), non_blocking=True)
        whole_at = iter(zip(starts[planes::2], starts[planes + 1 :: 2], strict=False))
        found_at = pairwise(ends)
        described = [
            (p.start, p.end - p.first, p.range.new.element_size())
            + ((0, 0, *next(whole_at)) if whole else (*next(found_at), -1, -1))
            for p, whole in zip(pieces, choice, strict=True)
        ]
        where = Planes(starts[0], starts[1], starts[2], starts[3], ends[-1]) if planes else None
        return Found(Work(number, where, described), [p.range.name for p in pieces], Event(self.device))

    def _planes(self, pieces: list[_Piece], bounds: list[tuple[int, int]]) -> list[torch.Tensor]:
        """uint8 gaps [C], int32 long gaps [E], how many of those up to the end of each piece (int32), uint8 byte planes
        of the values [W, C]. `bounds`: of each of these pieces, its changes among theirs."""
        total = bounds[-1][1]
        at = torch.nonzero_static(self.changed, size=total).view(-1)  # int64 [C]
        edges = np.asarray(
            [(low, high - 1, p.first - 1) for (low, high), p in zip(bounds, pieces, strict=True)], np.int64
        )
        low, high, edge = upload(np.ascontiguousarray(edges.T), self.device)
        before = torch.empty_like(at)  # the change before; for the first of a piece, the last element before the piece
        before[1:] = at[:-1]
        before[low] = edge
        gaps = at - before - 1
        long = gaps >= container.ESCAPE
        most = min(total, len(self.changed) // (container.ESCAPE + 1))  # each takes that many elements
        long_at = torch.nonzero_static(long, size=most, fill_value=0).view(-1)
        short = gaps.clamp(max=container.ESCAPE).to(torch.uint8)
        values = self._values(at, pieces, bounds)
        planes = values.view(torch.uint8).view(-1, values.element_size()).T.contiguous()
        return [short, gaps[long_at].to(torch.int32), _up_to(long, high), planes]

    def _values(self, at: torch.Tensor, pieces: list[_Piece], bounds: list[tuple[int, int]]) -> torch.Tensor:
        """int16 [C]: zigzag ULP differences at the changes `at`; those of wider elements as they happen to be."""
        old, new = (torch.empty(len(at), dtype=torch.int16, device=self.device) for _ in range(2))
        low, k = 0, 0
        for run in self.runs:
            high = low
            while k < len(pieces) and pieces[k].first < run.end:
                high, k = bounds[k][1], k + 1
            if high > low and run.new.element_size() == 2:
                index = at[low:high] - run.at
                torch.index_select(run.old, 0, index, out=old[low:high])
                torch.index_select(run.new, 0, index, out=new[low:high])
            low = high
        step = to_order(new) - to_order(old)
        return (step >> 15) ^ (step + step)


def _up_to(flags: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """int32 [P]: how many of the first elements are set, each of the positions `last` included."""
    return torch.cumsum(flags, 0, dtype=torch.int32)[last]
