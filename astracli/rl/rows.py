"""Samples to rows with advantages: what a batch is divided from.

Only tokens that the policy drew are loss tokens (`loss_mask`); the others of a row are seen by attention and have a
position, and that is all.

Shape letters: P prompt tokens, T tokens behind it, N loss tokens of a row, S samples of a group, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from astracli.config.algorithms import AlgorithmTable
from astracli.config.recipe_rollout import RolloutTable
from astracli.rl import losses
from astracli.rl.types import Group, Sample


@dataclass
class Row:
    """One sample with its prompt: the unit that is never split."""

    index: int
    """Position in the batch, in the order of the groups."""
    group: Group
    sample: Sample
    advantage: float
    penalty: float = 0.0
    """What overlong shaping took off its reward."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        return len(self.group.prompt_tokens)

    @property
    def loss_tokens(self) -> int:
        return len(self.logprobs)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [P + T]"""
        return np.concatenate([self.group.prompt_tokens, self.sample.tokens]).astype(np.int32)

    @cached_property
    def predict(self) -> np.ndarray:
        """int64 [N]: the place in the row before each loss token, whose hidden state predicts it"""
        return np.flatnonzero(self.sample.loss_mask) + (self.prompt_length - 1)

    @cached_property
    def logprobs(self) -> np.ndarray:
        """float32 [N]: the behaviour policy's"""
        return self.sample.logprobs

    @cached_property
    def versions(self) -> np.ndarray:
        """int32 [N]"""
        return self.sample.versions


def overlong_penalties(lengths_S: np.ndarray, limit: int, fraction: float, penalty: float) -> np.ndarray:
    """float64 [S], >= 0: what DAPO's soft overlong punishment takes off each reward (arXiv 2503.14476, equation 13).

    0 up to `limit - cache` tokens, from there in a straight line to `penalty` at `limit`; cache = fraction * limit.
    """
    if fraction == 0.0:
        return np.zeros(len(lengths_S))
    cache = fraction * limit
    return penalty * np.clip((np.asarray(lengths_S, np.float64) - (limit - cache)) / cache, 0.0, 1.0)


def batch_normalise(advantages_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """float64 [B]: normalised once more over the batch, (a - mean) / (unbiased std + 1e-5).

    A sample counts `counts_B` times, as often as the loss's own mean counts it (`Normaliser.count`): its loss tokens
    where that is a mean over tokens, 1 where it is one over sequences. After this that mean of the advantage is 0,
    whatever the lengths are.
    """
    advantages_B, counts_B = np.asarray(advantages_B, np.float64), np.asarray(counts_B, np.float64)
    total = counts_B.sum()
    if total < 2:
        return np.zeros_like(advantages_B)
    centred_B = advantages_B - (advantages_B * counts_B).sum() / total
    variance = (centred_B**2 * counts_B).sum() / (total - 1)
    return centred_B / (np.sqrt(variance) + losses.EPS)


def rows_of(groups: Sequence[Group], algorithm: AlgorithmTable, rollout: RolloutTable) -> list[Row]:
    """Every sample with at least one drawn token, with its advantage.

    Samples without drawn tokens count in their group's mean and spread (their reward is real), but train nothing.
    Overlong shaping looks at all tokens behind the prompt, which fill the room; advantages at the drawn ones.
    """
    drawn = [np.array([s.drawn for s in g.samples]) for g in groups]
    lengths = [np.array([sum(len(seg.tokens) for seg in s.segments) for s in g.samples]) for g in groups]
    overlong = (algorithm.overlong_fraction, algorithm.overlong_penalty)
    penalties = [
        overlong_penalties(lengths_S, rollout.completion_room(len(g.prompt_tokens)), *overlong)
        for g, lengths_S in zip(groups, lengths, strict=True)
    ]
    chosen = losses.get(algorithm.name)
    per_group = [
        chosen.advantage(g.rewards - penalty_S, drawn_S, algorithm.own)
        for g, penalty_S, drawn_S in zip(groups, penalties, drawn, strict=True)
    ]
    if algorithm.batch_norm_advantage and groups:
        counts_B = np.concatenate([chosen.normaliser.count(drawn_S) for drawn_S in drawn])
        flat_B = batch_normalise(np.concatenate(per_group), counts_B)
        per_group = np.split(flat_B, np.cumsum([len(g.samples) for g in groups])[:-1])
    rows: list[Row] = []
    for group, advantages_S, penalty_S in zip(groups, per_group, penalties, strict=True):
        for sample, advantage, penalty in zip(group.samples, advantages_S, penalty_S, strict=True):
            if sample.drawn:
                rows.append(Row(len(rows), group, sample, float(advantage), float(penalty)))
    return rows
