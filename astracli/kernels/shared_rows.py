"""Packed rows in which a group's prompt stands once, and its samples go on from it: where what lies, for the layers.

Columns of a row, in this order: prompts, each but for its last token; the samples that go on from one, in the order of
the prompts, each with that last token in front (its hidden state predicts the sample's first token); whole samples,
which share nothing. To a layer a prompt is a segment that ends where several others begin.

The forward of a model gets it as the keyword argument `shared_prompts`, beside `cu_seqlens` (`varlen.py`). All that is
needed of it on the device is made when the row is, so that no layer waits for the device.

Shape letters: R prompts, S samples that go on from one, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astracli.kernels.upload import upload


@dataclass(frozen=True, eq=False)
class SharedRow:
    bounds: tuple[int, ...]
    """Where each segment begins, and the end of the last."""
    parents: tuple[int, ...]
    """[S], ascending: the prompt that each of the samples behind the prompts goes on from."""
    device: torch.device

    @classmethod
    def of(cls, bounds_S1: np.ndarray, parents_S: np.ndarray, device: torch.device) -> SharedRow:
        """`parents_S`: of every segment of the row, the segment that it goes on from, -1 of one that begins by itself.

        Raises ValueError where the segments are not in the order above.
        """
        going_on = np.flatnonzero(parents_S >= 0)
        parents = parents_S[going_on]
        first, count = (int(going_on[0]) if len(going_on) else 0), len(going_on)
        ordered = (going_on == np.arange(first, first + count)).all() and (np.diff(parents) >= 0).all()
        if not ordered or sorted(set(parents.tolist())) != list(range(first)) or (np.diff(bounds_S1) <= 0).any():
            raise ValueError("a row with shared prompts holds the prompts, then their samples, then whole samples")
        return cls(tuple(bounds_S1.tolist()), tuple(parents.tolist()), device)

    @property
    def roots(self) -> int:
        """How many prompts: R."""
        return self.parents[-1] + 1 if self.parents else 0

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def prompt_end(self) -> int:
        """The column behind the prompts."""
        return self.bounds[self.roots]

    @property
    def sample_end(self) -> int:
        """The column behind the samples that go on from one."""
        return self.bounds[self.roots + len(self.parents)]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """[R]: samples of each prompt."""
        return tuple(np.bincount(self.parents, minlength=self.roots).tolist())

    @cached_property
    def group_bounds(self) -> tuple[int, ...]:
        """[R + 1]: the columns of all samples of a prompt, counted from `prompt_end`."""
        ends = np.cumsum((0, *self.counts)) + self.roots
        return tuple(self.bounds[end] - self.prompt_end for end in ends)

    @cached_property
    def on_device(self) -> dict[str, Tensor]:
        """int32: `prompts` [R + 1] and `groups` [R + 1], the boundaries of both for attention; `rest`, those of all
        segments behind the prompts, counted from `prompt_end`."""
        return {
            "prompts": self._upload(self.bounds[: self.roots + 1], np.int32),
            "groups": self._upload(self.group_bounds, np.int32),
            "rest": self._upload(self.rest_bounds, np.int32),
        }

    @property
    def rest_bounds(self) -> tuple[int, ...]:
        return tuple(bound - self.prompt_end for bound in self.bounds[self.roots :])

    @property
    def prompt_bounds(self) -> tuple[int, ...]:
        return self.bounds[: self.roots + 1]

    @cached_property
    def padded(self) -> Padding:
        """All segments as padded rows."""
        return Padding.of(self.bounds, self.device)

    @cached_property
    def padded_prompts(self) -> Padding:
        return Padding.of(self.prompt_bounds, self.device)

    @cached_property
    def padded_rest(self) -> Padding:
        return Padding.of(self.rest_bounds, self.device)

    @cached_property
    def ends(self) -> Callable[..., Ends]:
        """`ends(window, all_segments)`, made once for each."""
        return lru_cache(lambda window, every: Ends.of(self, window, every))

    def _upload(self, values: Sequence[int] | np.ndarray, kind: Any) -> Tensor:
        return upload(np.ascontiguousarray(values, kind), self.device)

    def spread(self, x: Tensor) -> Tensor:
        """[R, ...] of the prompts -> [S, ...] of their samples."""
        spread: Tensor = _Spread.apply(x, self)
        return spread


class _Spread(torch.autograd.Function):
    """Its backward pass adds up in one order; `index_select`'s does not on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: SharedRow) -> Tensor:
        ctx.counts = row.counts
        if len(set(row.counts)) == 1:
            return x.repeat_interleave(row.counts[0], dim=0)
        return torch.cat([part.expand(n, *x.shape[1:]) for part, n in zip(x.split(1), row.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        counts, (grad,) = ctx.counts, grads
        if len(set(counts)) == 1:
            return grad.reshape(len(counts), counts[0], *grad.shape[1:]).sum(1), None
        return torch.stack([part.sum(0) for part in grad.split(list(counts))]), None


# ---- segments as padded rows

SPARE = 512
"""Cells of padding that are cheaper than another batch."""
SPARE_SHARE = 0.25
"""And the same as a part of the tokens."""


@dataclass(frozen=True, eq=False)
class Padding:
    """The segments of a row, right-padded, in batches of similar lengths: a CPU computes a few batches faster than many
    segments."""

    shapes: tuple[tuple[int, int], ...]
    """(segments, padded length) of every batch"""
    order: tuple[int, ...]
    """The segments, batch by batch."""
    columns: Tensor
    """int64 [cells of all batches]: the column that each cell holds; of padding, its segment's last."""
    cells: Tensor
    """int64 [T]: the cell of each column"""
    real: Tensor | None
    """bool [cells]; None where nothing is padded"""

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device) -> Padding:
        lengths = [b - a for a, b in pairwise(bounds)]
        shapes, order, columns, real = [], [], [], []
        cells = np.zeros(bounds[-1], np.int64)
        filled = 0
        for batch in _batches(lengths):
            longest = max(lengths[s] for s in batch)
            shapes.append((len(batch), longest))
            for s in batch:
                begin, length = bounds[s], lengths[s]
                columns.append(begin + np.minimum(np.arange(longest), length - 1))
                real.append(np.arange(longest) < length)
                cells[begin : begin + length] = np.arange(filled, filled + length)
                filled += longest
            order += batch
        mask = np.concatenate(real)
        return cls(
            tuple(shapes),
            tuple(order),
            upload(np.concatenate(columns).astype(np.int64), device),
            upload(cells, device),
            None if mask.all() else upload(mask, device),
        )

    def split(self, x: Tensor) -> list[Tensor]:
        """[cells, ...] -> [segments, length, ...] of every batch"""
        parts = x.split([n * length for n, length in self.shapes])
        return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]

    def pad(self, x: Tensor) -> list[Tensor]:
        """[T, ...] -> every batch, zeros in its padding; with a gradient"""
        return self.split(_Pad.apply(x, self))

    def take_back(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `pad`; with a gradient"""
        joined: Tensor = _TakeBack.apply(torch.cat([part.flatten(0, 1) for part in parts]), self)
        return joined

    def zeroed(self, x: Tensor) -> Tensor:
        """[cells, ...] with zeros in the padding, in place."""
        return x if self.real is None else x.mul_(self.real.view(-1, *[1] * (x.dim() - 1)))


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Segments by length, a new batch where padding the one before would cost more than it is worth."""
    batches: list[list[int]] = []
    tokens = 0
    for s in sorted(range(len(lengths)), key=lambda s: (lengths[s], s)):
        length = lengths[s]
        if batches:
            more = (len(batches[-1]) + 1) * length - (tokens + length)
            if more <= max(SPARE, SPARE_SHARE * (tokens + length)):
                batches[-1].append(s)
                tokens += length
                continue
        batches.append([s])
        tokens = length
    return batches


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return padding.zeroed(x.index_select(0, padding.columns))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.padding.cells), None


class _TakeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return x.index_select(0, padding.cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        padding: Padding = ctx.padding
        return padding.zeroed(grads[0].index_select(0, padding.columns)), None


# ---- what a convolution sees across a boundary


@dataclass(frozen=True, eq=False)
class Ends:
    """The last columns of every prompt and the first of the segments that begin behind something: a convolution that
    looks back over `window` columns computes these anew."""

    window: int
    tails: _Columns
    """[R x window]: zeros where a prompt is shorter"""
    heads: _Columns
    """[segments x window]: zeros where a segment is shorter"""
    segments: int
    before: int
    """How many of these segments stand in front of the samples that go on from a prompt."""
    behind: int

    @classmethod
    def of(cls, row: SharedRow, window: int, every: bool) -> Ends:
        """`every`: of all segments but the first; otherwise only of those that go on from a prompt."""
        roots, samples = row.roots, len(row.parents)
        last = len(row.bounds) - 1 if every else roots + samples
        begin = 1 if every else roots
        tails, heads = [], []
        for a, b in pairwise(row.prompt_bounds):
            back = np.arange(b - window, b)
            tails.append(np.where(back >= a, back, -1))
        for a, b in list(pairwise(row.bounds))[begin:last]:
            ahead = np.arange(a, a + window)
            heads.append(np.where(ahead < b, ahead, -1))
        back_to, ahead_to = (
            _Columns.of(np.concatenate([np.zeros(0, np.int64), *found]), row.device) for found in (tails, heads)
        )
        return cls(window, back_to, ahead_to, last - begin, max(0, roots - begin), last - max(begin, roots + samples))

    def inputs(self, x: Tensor, row: SharedRow) -> Tensor:
        """[T, C] -> [segments, 2 x window, C]: what stands before each of these segments, then its first columns."""
        tails: Tensor = _Take.apply(x, self.tails)
        heads: Tensor = _Take.apply(x, self.heads)
        channels = x.shape[1]
        windows = [row.spread(tails.view(-1, self.window, channels))]
        if self.before:
            windows.insert(0, x.new_zeros(self.before, self.window, channels))
        if self.behind:
            windows.append(x.new_zeros(self.behind, self.window, channels))
        return torch.cat([torch.cat(windows), heads.view(-1, self.window, channels)], 1)

    def placed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[segments, window, C] -> (columns, their values [columns, C])."""
        found = self.heads
        flat = values.flatten(0, 1)
        return found.columns, flat if found.all_there else flat.index_select(0, found.places)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Some columns of a row, at some places of a list."""

    columns: Tensor
    """int64 [n]"""
    places: Tensor
    """int64 [n]"""
    length: int
    """Of the list."""

    @classmethod
    def of(cls, wanted: np.ndarray, device: torch.device) -> _Columns:
        """`wanted`: -1 where the list holds no column."""
        places = np.flatnonzero(wanted >= 0)
        return cls(upload(wanted[places].astype(np.int64), device), upload(places, device), len(wanted))

    @property
    def all_there(self) -> bool:
        return len(self.places) == self.length


class _Take(torch.autograd.Function):
    """(x [T, C], columns) -> [places, C]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: _Columns) -> Tensor:
        ctx.wanted, ctx.tokens = wanted, x.shape[0]
        found = x.index_select(0, wanted.columns)
        if wanted.all_there:
            return found
        return x.new_zeros(wanted.length, x.shape[1]).index_copy_(0, wanted.places, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wanted, (grad,) = ctx.wanted, grads
        if not wanted.all_there:
            grad = grad.index_select(0, wanted.places)
        return grad.new_zeros(ctx.tokens, grad.shape[1]).index_copy_(0, wanted.columns, grad), None
