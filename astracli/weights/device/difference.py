"""Finds the difference between two versions on the GPU where they lie, so that only what changed goes to the host.

The GPU compares, gap-codes and splits into byte planes. The planes are copied into memory from which another process
compresses them (`publish.coder`). The bytes are those of the numpy path. On a GPU Triton kernels do it
(`change_kernels`); on a CPU, for tests, and where there is no Triton, torch operations.

A thread that asks a GPU how many values changed waits for everything that was queued before. So tensors are compared
many at a time (a pass), the counts are copied back without waiting, and several passes are queued before the counts of
the first are read. Every operation in the queue delays a training step beside it: a pass takes few, whatever it holds.

Letters: C changed elements of a pass, P pieces of it, E long gaps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from astracli.kernels.upload import upload
from astracli.weights.format import codec, container
from astracli.weights.format.container import Planes, Work

if TYPE_CHECKING:
    from astracli.weights.device.change_kernels import ByTriton

PIECES_AT_ONCE = 64
"""Pieces of one pass: bounds its temporaries to some 20 bytes for each change among 256 M elements, and what the other
process waits for at the beginning and has left to do at the end."""
_WHOLE_AT_ONCE = 16
"""Pieces that go to the host whole, together: 128 MiB of each version, where nearly every value changes."""
_RANGES_AT_ONCE = 448
"""Tensors of one pass: it has at most 512 pieces then, short ones included, and an int32 tells all of their elements
apart, 4 M a piece."""
_AHEAD = 4
"""Passes that are compared before the counts of the first of them are read."""


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
    """Everything that was queued on a device so far. `wait` sleeps until it is done."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)  # a spinning thread would hold a processor
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


@dataclass
class PassChanges:
    """The changes of one pass, on their way to the host."""

    work: Work
    """What codes them, once `ready`."""
    names: list[str]
    """Of each of the work's pieces."""
    ready: Event


class TensorRange(NamedTuple):
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


class RangePiece(NamedTuple):
    """Part of a range that is coded by itself."""

    range: TensorRange
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
) -> Iterator[PassChanges]:  # fmt: skip
    """The changed pieces of (name, base, new), in order, some at a time.

    `base` and `new`: flat, of one length and dtype; `new` on the device where all is compared, `base` anywhere.
    `piece`: elements, a power of two. `block(size)`: host memory for what changed in a pass: number and uint8 [size].
    """
    ahead: deque[ComparePass] = deque()
    for ranges in _passes(tensors, piece):
        ahead.append(ComparePass(ranges, piece))
        if len(ahead) > _AHEAD:
            yield from ahead.popleft().found(block)
    while ahead:
        yield from ahead.popleft().found(block)


def _passes(tensors: Iterable[tuple[str, torch.Tensor, torch.Tensor]], piece: int) -> Iterator[list[TensorRange]]:
    """Neighbouring tensors, `_RANGES_AT_ONCE` at most, of at most `PIECES_AT_ONCE` pieces of elements together; one is
    only cut between pieces."""
    found: list[TensorRange] = []
    at, most = 0, piece * PIECES_AT_ONCE
    for name, base, new in tensors:
        old, start = base if base.device == new.device else base.to(new.device), 0
        while start < len(new):
            length = len(new) - start
            if length > most - at:
                length = (most - at) // piece * piece
            if length and len(found) < _RANGES_AT_ONCE:
                both = (old, new) if length == len(new) else (t[start : start + length] for t in (old, new))
                found.append(TensorRange(name, start, at, *both))
                start, at = start + length, at + length
            else:
                yield found
                found, at = [], 0
    if found:
        yield found


class ComparePass:
    """Which elements of some ranges changed. Made without waiting for the device; `found` waits for the counts."""

    def __init__(self, ranges: list[TensorRange], piece: int):
        self.device = ranges[0].new.device
        self.pieces = [
            RangePiece(r, low, min(low + piece, r.end)) for r in ranges for low in range(r.at, r.end, piece)
        ]  # fmt: skip
        self.changes: ByTorch | ByTriton
        if self.device.type == "cuda" and find_spec("triton"):
            from astracli.weights.device.change_kernels import ByTriton

            self.changes = ByTriton(self.pieces, piece)
        else:
            self.changes = ByTorch(self.pieces, piece)
        counted = self.changes.counted
        self._counted = torch.empty(counted.shape, dtype=counted.dtype, pin_memory=self.device.type == "cuda")
        self._counted.copy_(counted, non_blocking=True)
        self._ready = Event(self.device)

    def found(self, block: Callable[[int], tuple[int, torch.Tensor]]) -> Iterator[PassChanges]:
        """What changed, together, unless much of it goes to the host whole."""
        self._ready.wait()
        counts = [0, *self.changes.counts(self._counted)]
        part: list[tuple[int, int, bool]] = []
        for k, piece in enumerate(self.pieces):
            if size := counts[k + 1] - counts[k]:
                width, length = piece.range.new.element_size(), piece.end - piece.first
                whole = len(codec.candidates(width, size, length)) > 1
                if whole and sum(w for _, _, w in part) == _WHOLE_AT_ONCE:
                    yield self._found(part, block)
                    part = []
                part.append((k, size, whole))
        if part:
            yield self._found(part, block)

    def _found(
        self, part: list[tuple[int, int, bool]], block: Callable[[int], tuple[int, torch.Tensor]]
    ) -> PassChanges:
        """(piece, its changes, whether all of it is needed), in order. Everything is asked of the device at once."""
        changed, sizes, choice = zip(*part, strict=True)
        pieces = [self.pieces[k] for k in changed]
        sparse = [k for k, whole in zip(changed, choice, strict=True) if not whole]
        ends = list(accumulate((size for size, whole in zip(sizes, choice, strict=True) if not whole), initial=0))
        arrays = self.changes.planes(sparse, [high - low for low, high in pairwise(ends)]) if sparse else []
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
        return PassChanges(Work(number, where, described), [p.range.name for p in pieces], Event(self.device))


class ByTorch:
    """The changes of one pass in torch operations, the same on every device."""

    def __init__(self, pieces: Sequence[RangePiece], most: int):
        """`pieces`: in order, all on one device, of at most `most` elements."""
        self._device, self._pieces = pieces[0].range.new.device, pieces
        self._changed = torch.empty(pieces[-1].end, dtype=torch.bool, device=self._device)
        for piece in pieces:
            torch.ne(*piece.bits(), out=self._changed[piece.first : piece.end])
        last = upload(np.asarray([p.end - 1 for p in pieces], np.int64), self._device)
        self.counted = _up_to(self._changed, last)
        """To be copied to the host, for `counts`."""

    def counts(self, counted: torch.Tensor) -> list[int]:
        """How many elements changed up to the end of each piece. `counted`: on the host."""
        found: list[int] = counted.tolist()
        return found

    def planes(self, sparse: Sequence[int], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Of these pieces, 2-byte elements with `sizes` changes each, C in all: uint8 gaps [C], int32 long gaps [E] and
        how many of those there are up to the end of each piece (int32), uint8 byte planes of the values [2, C]."""
        pieces, ends = [self._pieces[k] for k in sparse], list(accumulate(sizes))
        changed = torch.zeros_like(self._changed)  # no other piece's
        for piece in pieces:
            changed[piece.first : piece.end] = self._changed[piece.first : piece.end]
        at = torch.nonzero_static(changed, size=ends[-1]).view(-1)  # int64 [C]
        starts = np.asarray([[0, *ends[:-1]], [p.first - 1 for p in pieces]], np.int64)
        low, edge = upload(starts, self._device)
        before = torch.empty_like(at)  # the change before; for the first of a piece, the last element before the piece
        before[1:] = at[:-1]
        before[low] = edge
        gaps = (at - before - 1).to(torch.int32)
        steps = torch.empty(len(at), dtype=torch.int16, device=self._device)
        for piece, high, size in zip(pieces, ends, sizes, strict=True):
            where = slice(high - size, high)
            old, new = (to_order(bits[at[where] - piece.first]) for bits in piece.bits())
            steps[where] = new - old
        values = (steps >> 15) ^ (steps + steps)  # zigzag
        planes = values.view(torch.uint8).view(-1, 2).T.contiguous()
        short = gaps.clamp(max=container.ESCAPE).to(torch.uint8)
        return [short, *long_gaps(gaps, [end - 1 for end in ends], len(self._changed)), planes]


def long_gaps(gaps: torch.Tensor, last: list[int], elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of `gaps` that a byte does not hold, int32 [E] with some nothings behind, and how many there are up to each
    of the positions `last` (int32). `elements`: that the gaps are among, of which each long one takes 256."""
    long = gaps >= container.ESCAPE
    most = min(len(gaps), elements // (container.ESCAPE + 1))
    at = torch.nonzero_static(long, size=most, fill_value=0).view(-1)
    return gaps[at], _up_to(long, upload(np.asarray(last, np.int64), gaps.device))


def _up_to(flags: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """int32 [P]: how many of the first elements are set, each of the positions `last` included."""
    return torch.cumsum(flags, 0, dtype=torch.int32)[last]
