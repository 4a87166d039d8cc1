"""Triton kernels over many tensors at once: their digests in one pass, and one scatter of all their changes.

Both read a table of work items, so that one launch covers a whole model. Imported only where a CUDA tensor is; the
torch forms that they are tested against are `digest.digest_tensor` and `resident.Scatter.by_torch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from astracli.weights.format import digest

BLOCK = 1024
"""Changed elements of one work item of the scatter."""
TILE = 2048
"""Columns of one digest item: eight elements for each of its 256 threads, 16 bytes of bf16."""
ROWS = 64
"""Rows of one digest item."""


@triton.jit
def _digest(  # type: ignore[no-untyped-def]
    views, items, rows, stride, columns, out, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    """out[slot] += sum over an item's rows and columns of row * column * bits; modulo 2^64 by overflow."""
    item = items + tl.program_id(0) * 4
    view = views + tl.load(item) * 4
    first_row = tl.load(item + 1)
    count = tl.load(item + 2)
    column = tl.load(item + 3)
    if WIDTH == 2:
        base = tl.load(view).to(tl.pointer_type(tl.int16))
    else:
        base = tl.load(view).to(tl.pointer_type(tl.int32))
    low = tl.load(view + 1)
    size = tl.load(view + 2) - low
    slot = tl.load(view + 3)
    if ALIGNED:  # what lets eight elements be one load
        base = tl.multiple_of(base, 16)
        size = tl.multiple_of(size, 8)
    lane = tl.arange(0, TILE)
    one = tl.zeros([TILE], tl.int64)
    two = tl.zeros([TILE], tl.int64)
    for k in range(count):
        row = first_row + k
        origin = row * 16384 + column - low
        if ALIGNED:
            origin = tl.multiple_of(origin, 8)
        at = origin + lane
        bits = tl.load(base + at, mask=(at >= 0) & (at < size), other=0).to(tl.int64)
        one += bits * tl.load(rows + row)
        two += bits * tl.load(rows + stride + row)
    one *= tl.load(columns + column + lane)
    two *= tl.load(columns + 16384 + column + lane)
    tl.atomic_add(out + slot * 2, tl.sum(one, 0))
    tl.atomic_add(out + slot * 2 + 1, tl.sum(two, 0))


@triton.jit
def _scatter(items, values, indices, WIDTH: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Change up to BLOCK elements of one view in place; kind 0 ULP steps, 1 XOR, 2 new bits."""
    item = items + tl.program_id(0) * 6
    value_at = tl.load(item + 1)
    index_at = tl.load(item + 2)
    offset = tl.load(item + 3)
    inside = tl.arange(0, BLOCK) < tl.load(item + 4)
    kind = tl.load(item + 5)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if WIDTH == 2:
        view = tl.load(item).to(tl.pointer_type(tl.int16))
    else:
        view = tl.load(item).to(tl.pointer_type(tl.int32))
    dense = index_at < 0
    sparse = inside & (index_at >= 0)
    index = tl.where(dense, offset + lane, tl.load(indices + index_at + lane, mask=sparse, other=0).to(tl.int64))
    value = tl.load(values + value_at + lane, mask=inside, other=0).to(tl.int32)
    old = tl.load(view + index, mask=inside, other=0).to(tl.int32)
    if WIDTH == 2:  # in the upper half, so that overflow and sign are those of 16 bits
        value = value << 16
        old = old << 16
    order = tl.where(old < 0, ~old, old ^ TOP) + value
    stepped = tl.where(order < 0, order ^ TOP, ~order)
    new = tl.where(kind == 0, stepped, tl.where(kind == 1, old ^ value, value))
    if WIDTH == 2:
        tl.store(view + index, (new >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(view + index, new, mask=inside)


@cache
def digest_items(low: int, high: int) -> np.ndarray[Any, Any]:
    """int64 [n, 3]: (first row, rows, first column) of the items that cover elements [low, high) of a tensor.
    The same array every time: versions of a model differ only in where they lie."""
    first, last = low >> 14, (high - 1) >> 14
    columns = np.arange(0, 1 << 14, TILE)
    if first == last:
        columns = columns[(columns + TILE > (low & 16383)) & (columns <= ((high - 1) & 16383))]
    starts = np.arange(first, last + 1, ROWS)
    row, column = (grid.ravel() for grid in np.meshgrid(starts, columns, indexing="ij"))
    return np.stack([row, np.minimum(ROWS, last + 1 - row), column], axis=1)


class DigestPlan:
    """Digests of many ranges in one pass over them. Tables are made once: the ranges must stay where they are."""

    def __init__(self, ranges: Sequence[tuple[torch.Tensor, int]], slots: Sequence[int]):
        """`ranges`: (flat tensor, its start in the flattened whole), all on one device. Ranges with the same slot are
        added up; an empty one is nothing."""
        self._device, self._keep = ranges[0][0].device, list(ranges)
        self._slots = max(slots) + 1
        groups: dict[tuple[int, bool], tuple[list[list[int]], list[np.ndarray[Any, Any]]]] = {}
        top = 0
        for (flat, start), slot in zip(ranges, slots, strict=True):
            if not len(flat):
                continue
            end, width = start + len(flat), flat.element_size()
            aligned = flat.data_ptr() % 16 == 0 and start % 8 == 0 and len(flat) % 8 == 0
            views, items = groups.setdefault((width, aligned), ([], []))
            found = digest_items(start, end)
            items.append(np.insert(found, 0, len(views), axis=1))
            views.append([flat.data_ptr(), start, end, slot])
            top = max(top, ((end - 1) >> 14) + 1)
        self._groups = [
            (key, self._put(np.array(views)), self._put(np.concatenate(items)))
            for key, (views, items) in groups.items()
        ]
        self._rows = digest.torch_rows(str(self._device), 1 << max(0, top - 1).bit_length())
        self._columns = digest.torch_columns(str(self._device))

    def _put(self, table: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table, np.int64)).to(self._device)

    def launch(self) -> torch.Tensor:
        """int64 [slots, 2] on the device, not waited for."""
        out = torch.zeros(self._slots, 2, dtype=torch.int64, device=self._device)
        for (width, aligned), views, items in self._groups:
            tables = (views, items, self._rows, self._rows.shape[1], self._columns, out)
            _digest[(len(items),)](*tables, WIDTH=width, ALIGNED=aligned, TILE=TILE, num_warps=8)
        return out

    def lanes(self) -> list[digest.Lanes]:
        return digest.lanes_of(self.launch())


def work_items(runs: Sequence[tuple[int, int, int, int, int]]) -> np.ndarray[Any, Any]:
    """int64 [n, 6], as `scatter` reads it, each of at most BLOCK elements. Of a run: address of its view's element 0,
    first value, first index (-1: consecutive elements), count, kind."""
    address, value, index, count, kind = np.array(runs, np.int64).T
    items = -(-count // BLOCK)
    of = np.repeat(np.arange(len(runs)), items)
    start = (np.arange(len(of)) - np.repeat(np.cumsum(items) - items, items)) * BLOCK
    indices = np.where(index[of] < 0, -1, index[of] + start)
    left = np.minimum(BLOCK, count[of] - start)
    return np.stack([address[of], value[of] + start, indices, start, left, kind[of]], axis=1)


def scatter(table: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> None:
    """`table`: int64 [n, 6] on the device: address of a view's element 0, first value, first index (-1: consecutive
    elements), first element when consecutive, count <= BLOCK, kind. `values`: int16 or int32; `indices`: int32."""
    width = values.element_size()
    _scatter[(len(table),)](table, values, indices, WIDTH=width, TOP=-(1 << 31), BLOCK=BLOCK, num_warps=4)


def warm(device: torch.device) -> None:
    """Compile every variant, on memory of its own: the first pause should not wait for a compiler."""
    for dtype in (torch.int16, torch.int32):
        flat = torch.zeros(2 << 14, dtype=dtype, device=device)
        DigestPlan([(flat, 16 << 14), (flat[1:], 1)], [0, 1]).lanes()  # 17 rows and more: a table as of a real model
        item = torch.tensor([[flat.data_ptr(), 0, 0, 0, 1, 0]], dtype=torch.int64, device=device)
        scatter(item, flat[:16].clone(), torch.zeros(16, dtype=torch.int32, device=device))
    torch.cuda.synchronize(device)
