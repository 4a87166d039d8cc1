"""Advantages: how much better a sample was than the others of its prompt.

Shape letters: S samples of a group, B samples of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

EPS = 1e-5
"""Added to every standard deviation: a group whose rewards are all equal gets zeros."""


def overlong_penalties(lengths_S: np.ndarray, limit: int, fraction: float, penalty: float) -> np.ndarray:
    """float64 [S], >= 0: what DAPO's soft overlong punishment takes off each reward (arXiv 2503.14476, equation 13).

    0 up to `limit - cache` tokens, from there in a straight line to `penalty` at `limit`; cache = fraction * limit.
    """
    if fraction == 0.0:
        return np.zeros(len(lengths_S))
    cache = fraction * limit
    return penalty * np.clip((np.asarray(lengths_S, np.float64) - (limit - cache)) / cache, 0.0, 1.0)


def group_advantages(rewards_S: np.ndarray, mode: Literal["group", "mean"]) -> np.ndarray:
    """float64 [S]. `group`: (r - mean) / (unbiased std + 1e-5); `mean`: r - mean. One sample alone gets 0."""
    rewards_S = np.asarray(rewards_S, np.float64)
    centred_S = rewards_S - rewards_S.mean()
    if mode == "mean" or len(rewards_S) < 2:
        return centred_S
    return centred_S / (rewards_S.std(ddof=1) + EPS)


def batch_normalise(advantages_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """float64 [B]: normalised once more over the batch, (a - mean) / (unbiased std + 1e-5).

    A sample counts `counts_B` times, as often as the loss's own mean counts it: its loss tokens where that is a mean
    over tokens, 1 where it is one over sequences. After this that mean of the advantage is 0, whatever the lengths are.
    """
    advantages_B, counts_B = np.asarray(advantages_B, np.float64), np.asarray(counts_B, np.float64)
    total = counts_B.sum()
    if total < 2:
        return np.zeros_like(advantages_B)
    centred_B = advantages_B - (advantages_B * counts_B).sum() / total
    variance = (centred_B**2 * counts_B).sum() / (total - 1)
    return centred_B / (np.sqrt(variance) + EPS)


def advantages(
    rewards: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
    *,
    mode: Literal["group", "mean"],
    batch_norm: bool,
) -> list[np.ndarray]:
    """Advantages of every group, each float64 [S]; `rewards` and `counts` (see `batch_normalise`) are each [S]."""
    result = [group_advantages(r, mode) for r in rewards]
    if not batch_norm or not result:
        return result
    flat_B = batch_normalise(np.concatenate(result), np.concatenate(list(counts)))
    return np.split(flat_B, np.cumsum([len(r) for r in result])[:-1])
