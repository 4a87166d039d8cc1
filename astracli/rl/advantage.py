"""What is done to rewards and advantages beside any algorithm: overlong shaping, and the spread of the batch.

Shape letters: S samples of a group, B samples of the batch.
"""

from __future__ import annotations

import numpy as np

from astracli.rl.losses import EPS


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
    return centred_B / (np.sqrt(variance) + EPS)
