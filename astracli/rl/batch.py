"""From rows to what a trainer computes on: minibatches and micro-batches; the same on every rank.

Order of division: batch -> minibatches (one optimizer step each, whole samples, near-equal token counts) -> ranks
(near-equal token counts) -> micro-batches inside a token budget (right-padded rows of similar length, or packed rows:
`training/packing.py`). Every rank computes the whole division from the same groups and takes its share. A rank that has
fewer micro-batches than another gets empty ones, so that collectives match.

Shape letters: B rows of a micro-batch, L its padded length, N its loss tokens, S segments of a packed row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from astracli.config.recipe import Recipe
from astracli.rl.rows import Row, rows_of
from astracli.rl.types import Group


@dataclass
class MicroBatch:
    """Right-padded rows, or one packed row. Its loss tokens, flat, are those of the rows."""

    rows: list[Row]
    """Empty in a micro-batch that only keeps ranks in step."""
    tokens_BL: np.ndarray
    """int64"""
    mask_BL: np.ndarray
    """int64: 1 on tokens, 0 on padding"""
    predict_N: np.ndarray
    """int64: flat position (row * L + column) of the hidden state that predicts the token"""
    bounds_S1: np.ndarray | None = None
    """int64 [S + 1]: segment s of a packed row [1, T] is columns bounds[s] to bounds[s + 1]; None = padded rows"""
    parents_S: np.ndarray | None = None
    """int64 [S]: the segment that this one goes on from, a prompt that stands once for several samples
    (`training/shared_prompts.py`); -1 = it begins by itself. None = all do"""

    @property
    def target_N(self) -> np.ndarray:
        """int64: the token at column i is predicted by the hidden state at column i - 1."""
        return self.tokens_BL.reshape(-1)[self.predict_N + 1]

    @property
    def logprob_N(self) -> np.ndarray:
        """float32: behaviour"""
        return np.concatenate([np.zeros(0, np.float32), *(row.logprobs for row in self.rows)])

    @property
    def version_N(self) -> np.ndarray:
        """int32"""
        return np.concatenate([np.zeros(0, np.int32), *(row.versions for row in self.rows)])

    @property
    def advantage_N(self) -> np.ndarray:
        """float32"""
        return np.array([row.advantage for row in self.rows], np.float32)[self.sequence_N]

    @property
    def sequence_N(self) -> np.ndarray:
        """int64: the row of every token."""
        return np.repeat(np.arange(len(self.rows)), [row.loss_tokens for row in self.rows])


@dataclass
class Batch:
    """One step's data as one rank sees it, and what all ranks know of the whole."""

    groups: list[Group]
    rows: list[Row]
    """All rows of all ranks."""
    minibatches: list[list[MicroBatch]]
    """This rank's micro-batches."""
    minibatch_tokens: list[int]
    """Loss tokens of each minibatch, over all ranks: the denominator of the token mean."""

    @cached_property
    def versions(self) -> np.ndarray:
        """int32, all loss tokens of all ranks"""
        return np.concatenate([row.versions for row in self.rows])

    @property
    def loss_tokens(self) -> int:
        return sum(self.minibatch_tokens)

    @property
    def rows_per_minibatch(self) -> float:
        """The denominator of a mean over sequences, the same for every minibatch: they are divided by tokens, so one
        with long rows has fewer of them, and its own count would give a long sequence a larger share."""
        return len(self.rows) / len(self.minibatches)

    def staleness(self, version: int) -> tuple[float, int]:
        """Mean and largest lag of a token behind `version`, in versions."""
        lag = version - self.versions
        return (float(lag.mean()), int(lag.max())) if len(lag) else (0.0, 0)

    def overlong(self) -> dict[str, float]:
        """Metrics of overlong shaping: the fraction of samples it touched, and what it took off a reward on average."""
        penalties = np.array([row.penalty for row in self.rows])
        return {
            "overlong_fraction": float((penalties > 0).mean()),
            "overlong_penalty_mean": float(penalties.mean()),
        }


def divide(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """`parts` lists of whole rows with near-equal token counts: longest first, each to the emptiest part."""
    result: list[list[Row]] = [[] for _ in range(parts)]
    load = [0] * parts
    for row in sorted(rows, key=len, reverse=True):
        emptiest = min(range(parts), key=lambda part: (load[part], len(result[part])))
        result[emptiest].append(row)
        load[emptiest] += len(row)
    return result


def micro_batches(rows: Sequence[Row], tokens_per_microbatch: int, pad_token: int) -> list[MicroBatch]:
    """Rows of similar length together, rows * longest <= budget; a row over the budget travels alone."""
    result: list[MicroBatch] = []
    pending: list[Row] = []
    for row in sorted(rows, key=lambda r: (len(r), r.index)):
        if pending and (len(pending) + 1) * len(row) > tokens_per_microbatch:
            result.append(pad_rows(pending, pad_token))
            pending = []
        pending.append(row)
    if pending:
        result.append(pad_rows(pending, pad_token))
    return result


Parts = Callable[[Sequence[Row], int], list[list[Row]]]
"""(rows, how many) -> as many parts: minibatches, or the shares of ranks"""
Divide = Callable[[Sequence[Row], int, int], list[MicroBatch]]
"""(rows, tokens per micro-batch, pad token) -> micro-batches"""


class Division(NamedTuple):
    """How the rows of a batch are divided."""

    parts: Parts
    micro_batches: Divide


Join = Callable[[list[Row], int], MicroBatch]
"""(rows, pad token) -> one micro-batch of them all"""


def pad_rows(rows: list[Row], pad_token: int) -> MicroBatch:
    """Right-padded rows."""
    longest = max(map(len, rows))
    tokens_BL = np.full((len(rows), longest), pad_token, np.int64)
    mask_BL = np.zeros((len(rows), longest), np.int64)
    predict: list[np.ndarray] = []
    for b, row in enumerate(rows):
        tokens_BL[b, : len(row)] = row.tokens
        mask_BL[b, : len(row)] = 1
        predict.append(row.predict + b * longest)
    return MicroBatch(rows, tokens_BL, mask_BL, np.concatenate(predict))


def empty_micro_batch(pad_token: int) -> MicroBatch:
    """One token and no loss: a forward and backward that moves nothing."""
    return MicroBatch([], np.full((1, 1), pad_token), np.ones((1, 1), np.int64), np.zeros(0, np.int64))


def build_batch(
    groups: Sequence[Group],
    recipe: Recipe,
    *,
    step: int,
    rows: Sequence[Row] | None = None,
    pad_token: int = 0,
    rank: int = 0,
    world_size: int = 1,
    divide_rows: Divide = micro_batches,
    instead: Callable[[Sequence[Row]], Division | None] | None = None,
) -> Batch:
    """The batch of `step`, of which this rank gets its share: the same for the same (groups, seed, step) in whatever
    order the groups come. `rows`: those of the groups, where they are made already. `instead`: what it gives for the
    rows of the batch divides them, if it gives any.

    Raises ValueError when no sample holds a token.
    """
    ordered = sorted(groups, key=lambda g: g.lease_id)
    rows = rows_of(ordered, recipe.algorithm, recipe.rollout) if rows is None else rows
    if not rows:
        raise ValueError(f"the batch of step {step} has {len(ordered)} groups and no completion token")
    parted, joined = (instead(rows) if instead is not None else None) or Division(divide, divide_rows)
    shuffled = list(rows)
    random.Random(f"{recipe.seed}:{step}").shuffle(shuffled)
    mine: list[list[MicroBatch]] = []
    tokens: list[int] = []
    parts = parted(shuffled, min(recipe.train.minibatches, len(rows)))
    for part in parts:
        shares = [joined(share, recipe.train.tokens_per_microbatch, pad_token) for share in parted(part, world_size)]
        padding = max(map(len, shares)) - len(shares[rank])
        mine.append(shares[rank] + [empty_micro_batch(pad_token) for _ in range(padding)])
        tokens.append(sum(row.loss_tokens for row in part))
    return Batch(ordered, list(rows), mine, tokens)
