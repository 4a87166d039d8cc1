"""What a causal convolution sees across the boundaries of a packed row in which prompts are shared.

The whole row goes through a kernel that does not know of prompts; of a segment that stands behind another, its first
columns are then computed anew, from what it goes on from and from these columns themselves.

Shape letters: R prompts, T tokens of a row, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astracli.kernels.shared_rows import SharedRow
from astracli.kernels.upload import upload


@lru_cache(maxsize=4)  # the layers of a model ask for the same ones
def ends(row: SharedRow, window: int, every: bool) -> Ends:
    """Made once for a row: see `Ends.of`."""
    return Ends.of(row, window, every)


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
