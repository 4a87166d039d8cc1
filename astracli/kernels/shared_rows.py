"""Packed rows in which a group's prompt stands once, and its samples go on from it: where what lies, for the layers.

Columns of a row, in this order: prompts, each but for its last token; the samples that go on from one, in the order of
the prompts, each with that last token in front (its hidden state predicts the sample's first token); whole samples,
which share nothing. To a layer a prompt is a segment that ends where several others begin.

The forward of a model gets it as the keyword argument `shared_prompts`, beside `cu_seqlens` (`varlen.py`). All that is
needed of it on the device is made when the row is, so that no layer waits for the device.

Shape letters: R prompts, S samples that go on from one, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
