"""The clipped policy gradient that several algorithms share: PPO's pessimistic minimum on a ratio range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from astracli.config.recipe import AlgorithmTable
from astracli.rl.losses import TokenLoss, Tokens

LOG_RATIO_BOUND = 20.0
"""exp() stays finite in fp32; no trained policy is this far from its behaviour. A limit there is none."""


@dataclass(frozen=True)
class ClipRange:
    """Ratios outside [low, high] stop training in the direction that led there."""

    low: float
    high: float

    @property
    def cap(self) -> float:
        return max(math.log(self.high), -math.log(self.low))


def ratio(log_ratio_N: Tensor) -> Tensor:
    """exp, finite: pi_theta / pi_behaviour for that log-ratio."""
    return log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def clipped_loss(log_ratio_N: Tensor, advantage_N: Tensor, limits: ClipRange) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) per token, and where the gradient is cut."""
    ratio_N = ratio(log_ratio_N)
    loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(limits.low, limits.high) * advantage_N)
    cut_N = ((advantage_N > 0) & (ratio_N > limits.high)) | ((advantage_N < 0) & (ratio_N < limits.low))
    return loss_N, cut_N


def fixed_range(log_ratio_N: Tensor, advantage_N: Tensor, table: AlgorithmTable) -> ClipRange:
    """[1 - clip_low, 1 + clip_high], whatever the batch: a `prepare`."""
    return ClipRange(max(1.0 - table.clip_low, 1e-6), 1.0 + table.clip_high)


def token_clipped(tokens: Tokens, limits: ClipRange) -> TokenLoss:
    """PPO's objective per token on pi_theta / pi_behaviour: a `token_loss`."""
    return TokenLoss(*clipped_loss(tokens.log_ratio_N, tokens.advantage_N, limits))


@dataclass(frozen=True)
class Weighted:
    """A clip range for pi_theta / pi_proximal, and a cap on the weight pi_proximal / pi_behaviour."""

    range: ClipRange
    weight_cap: float

    @property
    def cap(self) -> float:
        return self.range.cap


def weighted_range(log_ratio_N: Tensor, advantage_N: Tensor, table: AlgorithmTable) -> Weighted:
    """The fixed range and the fixed cap: a `prepare`."""
    return Weighted(fixed_range(log_ratio_N, advantage_N, table), table.weight_cap)
