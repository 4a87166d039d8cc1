"""Triton kernels that find the changes between two versions: one counts, one gathers, one codes what was gathered.

The first two read both versions, of many tensors in one launch, by a table of tiles; the third reads what changed. They
run beside a training step on the same GPU, which they cost two reads of both versions and a few launches. Imported only
where a CUDA tensor is; the torch form is `difference.ByTorch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from astracli.kernels.upload import upload
from astracli.weights.device import difference as device

TILE = 1 << 16
"""Elements of one program, at most."""
BLOCK = 2048
"""Elements that it looks at together: eight for each of its 256 threads, 16 bytes of bf16."""

Table = np.ndarray[Any, Any]


@triton.jit
def _count(tiles, out, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[slot] = the changed elements of a tile"""
    tile = tiles + tl.program_id(0) * 4
    if WIDTH == 2:
        old = tl.load(tile).to(tl.pointer_type(tl.int16))
        new = tl.load(tile + 1).to(tl.pointer_type(tl.int16))
    else:
        old = tl.load(tile).to(tl.pointer_type(tl.int32))
        new = tl.load(tile + 1).to(tl.pointer_type(tl.int32))
    length = tl.load(tile + 2).to(tl.int32)
    slot = tl.load(tile + 3)
    if ALIGNED:  # what lets eight elements be one load
        old = tl.multiple_of(old, 16)
        new = tl.multiple_of(new, 16)
        length = tl.multiple_of(length, 8)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + lane
        inside = at < length
        changed = tl.load(old + at, mask=inside, other=0) != tl.load(new + at, mask=inside, other=0)
        counts += changed.to(tl.int32)
    tl.store(out + slot, tl.sum(counts, 0))


@triton.jit
def _gather(tiles, at_out, bits_out, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's changes, behind those of the tiles before: where they are, and old and new bits in one int32."""
    tile = tiles + tl.program_id(0) * 5
    old = tl.load(tile).to(tl.pointer_type(tl.int16))
    new = tl.load(tile + 1).to(tl.pointer_type(tl.int16))
    length = tl.load(tile + 2).to(tl.int32)
    first = tl.load(tile + 3).to(tl.int32)
    behind = tl.load(tile + 4).to(tl.int32)
    if ALIGNED:
        old = tl.multiple_of(old, 16)
        new = tl.multiple_of(new, 16)
        length = tl.multiple_of(length, 8)
    lane = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        at = start + lane
        inside = at < length
        a = tl.load(old + at, mask=inside, other=0)
        b = tl.load(new + at, mask=inside, other=0)
        changed = a != b
        count = changed.to(tl.int32)
        rank = behind + tl.cumsum(count, 0) - count
        tl.store(at_out + rank, first + at, mask=changed)
        tl.store(bits_out + rank, (a.to(tl.int32) << 16) | (b.to(tl.int32) & 0xFFFF), mask=changed)
        behind += tl.sum(count, 0)


@triton.jit(do_not_specialize=["total"])
def _code(at, bits, total, gaps, short, values, PIECE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gap to the change before (int32, and a byte that is 255 for any longer one), and the step in the order of
    floats, zigzag, its lower byte and its upper. A piece begins at a multiple of PIECE."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < total
    here = tl.load(at + k, mask=inside, other=0)
    before = tl.load(at + k - 1, mask=inside & (k > 0), other=-1)
    gap = here - tl.maximum(before, (here & -PIECE) - 1) - 1  # the first of a piece counts from where that begins
    tl.store(gaps + k, gap, mask=inside)
    tl.store(short + k, tl.minimum(gap, 255).to(tl.uint8), mask=inside)
    both = tl.load(bits + k, mask=inside, other=0)
    old = both >> 16
    new = (both << 16) >> 16
    old = tl.where(old < 0, ~old, old ^ -32768)
    new = tl.where(new < 0, ~new, new ^ -32768)
    step = ((new - old) << 16) >> 16  # modulo 2^16, signed
    step = (step >> 31) ^ (step << 1)
    tl.store(values + k, (step & 255).to(tl.uint8), mask=inside)
    tl.store(values + total + k, ((step >> 8) & 255).to(tl.uint8), mask=inside)


class ByTriton:
    """The changes of one pass. `ByTorch` says what each method answers."""

    def __init__(self, pieces: Sequence[device.RangePiece], most: int):
        """`pieces`: all on one GPU, of at most `most` elements, a power of two."""
        if len(pieces) * most > 1 << 31:
            raise ValueError(f"{len(pieces)} pieces of {most} elements are too many for one pass")
        self._device, self._pieces, self._most = pieces[0].range.new.device, pieces, most
        sizes = np.asarray([p.end - p.first for p in pieces], np.int64)
        widths = np.asarray([p.range.new.element_size() for p in pieces], np.int64)
        starts = np.asarray([[side.data_ptr() for side in p.bits()] for p in pieces], np.int64)
        tiles = -(-sizes // TILE)
        self._piece = np.repeat(np.arange(len(pieces)), tiles)  # of each tile
        self._at = (np.arange(len(self._piece)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * TILE  # in its piece
        self._length = np.minimum(TILE, sizes[self._piece] - self._at)
        self._ends = np.cumsum(tiles)
        width = widths[self._piece]
        self._old, self._new = (starts[self._piece] + (self._at * width)[:, None]).T
        self._aligned = (self._old % 16 == 0) & (self._new % 16 == 0) & (self._length % 8 == 0)
        table = np.stack([self._old, self._new, self._length, np.arange(len(self._piece))], axis=1)
        self.counted = torch.empty(len(table), dtype=torch.int32, device=self._device)
        for size in (2, 4):
            for aligned, some in _split(table[width == size], self._aligned[width == size]):
                given = (upload(some, self._device), self.counted)
                _count[(len(some),)](*given, WIDTH=size, ALIGNED=aligned, BLOCK=BLOCK, num_warps=8)

    def counts(self, counted: torch.Tensor) -> list[int]:
        self._count = counted.numpy().astype(np.int64)
        up_to = np.concatenate([[0], np.cumsum(self._count)])
        found: list[int] = up_to[self._ends].tolist()
        return found

    def planes(self, sparse: Sequence[int], sizes: Sequence[int]) -> list[torch.Tensor]:
        total = sum(sizes)
        wanted = np.zeros(len(self._pieces), bool)
        wanted[list(sparse)] = True
        tiles = np.flatnonzero(wanted[self._piece] & (self._count > 0))
        counts, first = self._count[tiles], self._piece[tiles] * self._most + self._at[tiles]
        behind = np.cumsum(counts) - counts
        table = np.stack([self._old[tiles], self._new[tiles], self._length[tiles], first, behind], axis=1)
        at, bits, gaps = torch.empty(3, total, dtype=torch.int32, device=self._device)
        short = torch.empty(total, dtype=torch.uint8, device=self._device)
        values = torch.empty(2, total, dtype=torch.uint8, device=self._device)
        for aligned, some in _split(table, self._aligned[tiles]):
            _gather[(len(some),)](upload(some, self._device), at, bits, ALIGNED=aligned, BLOCK=BLOCK, num_warps=8)
        grid = (triton.cdiv(total, BLOCK),)
        _code[grid](at, bits, total, gaps, short, values, PIECE=self._most, BLOCK=BLOCK, num_warps=8)
        ends = [end - 1 for end in accumulate(sizes)]
        return [short, *device.long_gaps(gaps, ends, self._pieces[-1].end), values]


def _split(table: Table, aligned: np.ndarray[Any, Any]) -> Iterator[tuple[bool, Table]]:
    """The rows that are and those that are not, where there are any."""
    for kind in (True, False):
        if len(some := np.ascontiguousarray(table[aligned == kind], np.int64)):
            yield kind, some
