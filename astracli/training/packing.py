"""Micro-batches under a token budget: one packed row each on a GPU, right-padded rows on a CPU (`backend.packing`).

A packed row holds whole samples one after the other, without padding. `bounds_S1` says where each begins; positions
restart there, and no state may cross it (`varlen.py`; the check at the start proves it). On a CPU padding is cheaper
than many short segments.

Shape letters: S segments of a packed row, T its tokens, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from astracli.rl.batch import MicroBatch
from astracli.rl.rows import Row


def micro_batches(rows: Sequence[Row], tokens_per_microbatch: int, pad_token: int) -> list[MicroBatch]:
    """Packed rows of at most the budget: as few as best fit gives (longest first), and of nearly even lengths.

    A last row of leftovers would be short: a GPU computes it faster than the host can launch its kernels, and its
    gradients are added to the accumulators at the same cost. A sample over the budget travels alone. The same rows give
    the same division.
    """
    return [pack_rows(found) for found in divided(rows, tokens_per_microbatch)]


class Piece(Protocol):
    """What is not divided: a row, or several that are computed together."""

    @property
    def index(self) -> int: ...

    def __len__(self) -> int:
        """Tokens."""
        ...


P = TypeVar("P", bound=Piece)


def divided(rows: Sequence[P], most: int) -> list[list[P]]:
    """Rows in bins of at most so many tokens, as `micro_batches` has them."""
    ordered = sorted(rows, key=lambda r: (-len(r), r.index))
    fewest = _best_fit(ordered, most)
    even = evenly(ordered, len(fewest))
    fits = all(len(found) == 1 or sum(map(len, found)) <= most for found in even)
    return [sorted(found, key=lambda r: r.index) for found in (even if fits else fewest)]


def _best_fit(ordered: Sequence[P], most: int) -> list[list[P]]:
    """Each row into the fullest bin that has room for it."""
    bins: list[list[P]] = []
    load: list[int] = []
    for row in ordered:
        room = [i for i, used in enumerate(load) if used + len(row) <= most]
        if room:
            fullest = max(room, key=lambda i: (load[i], -i))
            bins[fullest].append(row)
            load[fullest] += len(row)
        else:
            bins.append([row])
            load.append(len(row))
    return bins


def evenly(ordered: Sequence[P], count: int) -> list[list[P]]:
    """Each row into the emptiest bin."""
    bins: list[list[P]] = [[] for _ in range(count)]
    load = [0] * count
    for row in ordered:
        emptiest = load.index(min(load))
        bins[emptiest].append(row)
        load[emptiest] += len(row)
    return bins


def pack_rows(rows: list[Row], pad_token: int = 0) -> MicroBatch:
    """One row of shape [1, T]."""
    bounds_S1 = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tokens_1T = np.concatenate([row.tokens for row in rows]).astype(np.int64)[None]
    predict = [row.predict + start for row, start in zip(rows, bounds_S1[:-1], strict=True)]
    return MicroBatch(rows, tokens_1T, np.ones_like(tokens_1T), np.concatenate(predict), bounds_S1)


GPU_LENGTHS = 128
"""On a GPU the length of a row is a multiple of this: matrix products have whole tiles, and torch's allocator finds
blocks again that come in few sizes. fla compiles its convolution for every thousand tokens of a row (once; kept on
disk). Rows of a minibatch are nearly equally long, so all of them are padded alike."""


def rounded(micro: MicroBatch, multiple: int = GPU_LENGTHS) -> MicroBatch:
    """The same loss tokens in rows of a length that is a multiple of `multiple`; a packed row gets a segment more."""
    count, length = micro.tokens_BL.shape
    more = -length % multiple
    if not more:
        return micro
    bounds_S1, parents_S = micro.bounds_S1, micro.parents_S
    return replace(
        micro,
        tokens_BL=np.pad(micro.tokens_BL, ((0, 0), (0, more)), constant_values=int(micro.tokens_BL[0, 0])),
        mask_BL=np.pad(micro.mask_BL, ((0, 0), (0, more))),
        predict_N=micro.predict_N + micro.predict_N // length * more if count > 1 else micro.predict_N,
        bounds_S1=None if bounds_S1 is None else np.append(bounds_S1, length + more),
        parents_S=None if parents_S is None else np.append(parents_S, -1),
    )


def filled(micros: Sequence[MicroBatch]) -> dict[str, float]:
    """Metrics of how full the rows of these micro-batches are: the rest is padding. And where prompts are shared, how
    many tokens separate rows would have more."""
    tokens, cells = sum(int(m.mask_BL.sum()) for m in micros), sum(m.mask_BL.size for m in micros)
    found = {"microbatches": len(micros), "row_tokens": tokens, "packed_fraction": tokens / max(1, cells)}
    if any(m.parents_S is not None for m in micros):
        found["shared_tokens"] = sum(len(row) for m in micros for row in m.rows) - tokens
    return found


def positions(bounds_S1: np.ndarray, parents_S: np.ndarray | None = None) -> np.ndarray:
    """int64 [T]: 0, 1, ... from every boundary on; of a segment that goes on from another, from its end on."""
    lengths_S = np.diff(bounds_S1)
    first_S = -bounds_S1[:-1]
    if parents_S is not None:
        first_S = first_S + np.where(parents_S >= 0, lengths_S[parents_S], 0)
    return np.arange(bounds_S1[-1], dtype=np.int64) + np.repeat(first_S, lengths_S)
