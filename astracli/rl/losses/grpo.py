"""GRPO: PPO's clipped objective with group-relative advantages and a fixed clip range. Source: arXiv 2402.03300.

Left out on purpose: the per-sequence mean of the paper (the loss here is a token mean over the minibatch, as in DAPO,
arXiv 2503.14476; `clip_high` > `clip_low` is its clip-higher).
"""

from __future__ import annotations

from torch import Tensor

from astracli.recipe import AlgorithmTable
from astracli.rl.losses import Algorithm
from astracli.rl.losses.clipping import Range, clipped_loss


def prepare(log_ratio_N: Tensor, advantage_N: Tensor, table: AlgorithmTable) -> Range:
    """[1 - clip_low, 1 + clip_high], whatever the batch."""
    return Range(max(1.0 - table.clip_low, 1e-6), 1.0 + table.clip_high)


ALGORITHM = Algorithm("grpo", prepare, clipped_loss)
