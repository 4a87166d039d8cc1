"""Packed rows in which a group's prompt stands once: how a batch is divided, and whether that pays.

The order of columns is that of `kernels/shared_rows.py`. What is computed of a group's samples in one row is its
prompt, once and without its last token, and of every sample that token and what stands behind the prompt. Minibatches,
ranks and rows therefore hold whole groups where that makes the largest part smaller; a group that is too large is
divided, and each part has the prompt. A sample whose group has no other in its row, and any sample of a prompt of one
token, is a whole row like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from astracli.rl.batch import Division, MicroBatch
from astracli.rl.rows import Row
from astracli.training import packing


def division(rows: Sequence[Row], least_saved: float) -> Division | None:
    """How a batch is divided when its prompts are shared; None where this leaves out no more than `least_saved` of its
    tokens. The same for the same rows on every rank."""
    return Division(divide, micro_batches) if saved(rows) > least_saved else None


def saved(rows: Sequence[Row]) -> float:
    """The part of the tokens of separate rows that is not computed when each group is whole."""
    return 1.0 - cost(rows) / sum(map(len, rows))


def cost(rows: Iterable[Row]) -> int:
    """Tokens that are computed when these rows are together."""
    return sum(map(len, groups(rows)))


@dataclass(frozen=True)
class Together:
    """Rows of one group that are computed together. Its length is the tokens that this takes."""

    rows: tuple[Row, ...]

    @property
    def index(self) -> int:
        return min(row.index for row in self.rows)

    @property
    def shares(self) -> bool:
        return len(self.rows) > 1 and self.rows[0].prompt_length > 1

    def __len__(self) -> int:
        once = self.rows[0].prompt_length - 1
        return sum(map(len, self.rows)) - (len(self.rows) - 1) * once


def groups(rows: Iterable[Row]) -> list[Together]:
    """The rows by group, in the order in which groups first occur."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(id(row.group), []).append(row)
    return [Together(tuple(own)) for own in found.values()]


def divide(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """Parts of near-equal numbers of computed tokens: groups, the longest first, each to the emptiest part. The largest
    group is halved, and so on, while there are fewer pieces than parts, or the largest part gets smaller by it."""
    pieces, best, since = groups(rows), None, 0
    while True:
        divisible = [piece for piece in pieces if len(piece.rows) > 1]
        if len(pieces) >= parts or not divisible:
            bins = packing.evenly(sorted(pieces, key=len, reverse=True), parts)
            divided = [list(chain.from_iterable(piece.rows for piece in found)) for found in bins]
            largest = max(map(cost, divided))
            since = 0 if best is None or largest < best[0] else since + 1
            best = (largest, divided) if not since else best
        if not divisible or since > parts:
            assert best is not None
            return best[1]
        halved = max(divisible, key=len)
        middle = (len(halved.rows) + 1) // 2
        place = pieces.index(halved)
        pieces[place : place + 1] = [Together(halved.rows[:middle]), Together(halved.rows[middle:])]


def micro_batches(rows: Sequence[Row], tokens_per_microbatch: int, pad_token: int) -> list[MicroBatch]:
    """As `packing.micro_batches`; the budget counts what is computed. Samples of a group over the budget are divided
    among as few rows as hold them, each with the prompt."""
    units = [part for one in groups(rows) for part in _within(one, tokens_per_microbatch)]
    divided = packing.divided(units, tokens_per_microbatch)
    return [pack(list(chain.from_iterable(unit.rows for unit in found)), pad_token) for found in divided]


@dataclass(frozen=True)
class _Behind:
    """A sample with the last token of its prompt in front."""

    row: Row

    @property
    def index(self) -> int:
        return self.row.index

    def __len__(self) -> int:
        return len(self.row) - self.row.prompt_length + 1


def _within(one: Together, most: int) -> list[Together]:
    """Parts of a group within the budget, as far as its single samples are."""
    if len(one) <= most:
        return [one]
    room = most - one.rows[0].prompt_length + 1
    parts = packing.divided([_Behind(row) for row in one.rows], room)
    return [Together(tuple(behind.row for behind in part)) for part in parts]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The order in which `pack` lays rows."""
    found = groups(sorted(rows, key=lambda row: row.index))
    sharing, whole = [one for one in found if one.shares], [one for one in found if not one.shares]
    return [row for one in (*sharing, *whole) for row in one.rows]


def pack(rows: Sequence[Row], pad_token: int = 0) -> MicroBatch:
    """One row of shape [1, T]. Without samples that share a prompt it is what `packing.pack_rows` makes."""
    ordered = in_order(rows)
    sharing = [one for one in groups(ordered) if one.shares]
    if not sharing:
        return packing.pack_rows(ordered, pad_token)
    parts = [one.rows[0].tokens[: one.rows[0].prompt_length - 1] for one in sharing]
    parents, begins = [-1] * len(sharing), []
    for number, one in enumerate(sharing):
        parts += [row.tokens[row.prompt_length - 1 :] for row in one.rows]
        parents += [number] * len(one.rows)
        begins += [row.prompt_length - 1 for row in one.rows]
    whole = ordered[len(begins) :]
    parts += [row.tokens for row in whole]
    parents += [-1] * len(whole)
    begins += [0] * len(whole)
    bounds_S1 = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    tokens_1T = np.concatenate(parts).astype(np.int64)[None]
    starts = bounds_S1[len(sharing) : -1]
    predict = [row.predict - begin + start for row, begin, start in zip(ordered, begins, starts, strict=True)]
    return MicroBatch(
        ordered, tokens_1T, np.ones_like(tokens_1T), np.concatenate(predict), bounds_S1, np.array(parents, np.int64)
    )


def alone_in(rows: Sequence[Row], index: int, pad_token: int) -> tuple[MicroBatch, slice]:
    """The row that `rows` make together, with nothing but row `index` of `in_order(rows)` and its prompt in it: padding
    stands in the place of all other tokens. And which loss tokens are its own."""
    micro = pack(rows, pad_token)
    first = len(micro.bounds_S1) - 1 - len(micro.rows) if micro.bounds_S1 is not None else 0
    assert micro.bounds_S1 is not None
    kept = np.zeros(micro.tokens_BL.shape[1], bool)
    segments = [first + index]
    if micro.parents_S is not None and (parent := int(micro.parents_S[first + index])) >= 0:
        segments.append(parent)
    for segment in segments:
        kept[micro.bounds_S1[segment] : micro.bounds_S1[segment + 1]] = True
    micro.tokens_BL[0, ~kept] = pad_token
    counts = [row.loss_tokens for row in micro.rows]
    before = sum(counts[:index])
    return micro, slice(before, before + counts[index])


def some(rows: Sequence[Row], chosen: Sequence[Row], tokens_per_microbatch: int) -> list[Row]:
    """Rows for the check of rows in the place of `chosen`: pairs of samples that share a prompt, of two groups or more
    where that is no more work."""
    most = max(tokens_per_microbatch, sum(map(len, chosen)))
    pairs: list[list[Row]] = []
    for one in sorted(groups(rows), key=lambda one: (-one.rows[0].prompt_length, one.index)):
        if one.shares:
            pairs.append(sorted(one.rows, key=lambda row: (len(row), row.index))[:: len(one.rows) - 1][:2])
    count = max(2, len(chosen) // 2)
    spread = pairs[:: max(1, len(pairs) // count)][:count]
    while len(spread) > 1 and sum(cost(pair) for pair in spread) > most:
        spread.pop(0)
    return in_order([row for pair in spread for row in pair])
