"""The clipped policy gradient that several algorithms share: PPO's pessimistic minimum on a ratio range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp() stays finite in fp32; no trained policy is this far from its behaviour."""


@dataclass(frozen=True)
class Range:
    """Ratios outside [low, high] stop training in the direction that led there."""

    low: float
    high: float

    @property
    def cap(self) -> float:
        return max(math.log(self.high), -math.log(self.low))


def ratio(log_ratio_N: Tensor) -> Tensor:
    """pi_theta / pi_behaviour, finite."""
    return log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def clipped_loss(log_ratio_N: Tensor, advantage_N: Tensor, limits: Range) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) per token, and where the gradient is cut."""
    ratio_N = ratio(log_ratio_N)
    loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(limits.low, limits.high) * advantage_N)
    cut_N = ((advantage_N > 0) & (ratio_N > limits.high)) | ((advantage_N < 0) & (ratio_N < limits.low))
    return loss_N, cut_N
