"""The clipped policy gradient that several algorithms share: PPO's pessimistic minimum on a ratio range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from astracli.config.recipe_run import Table
from astracli.rl.losses import TokenLoss, Tokens, UsualSettings

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp() stays finite in fp32; no trained policy is this far from its behaviour. A limit there is none."""


class RangeSettings(Table):
    clip_low: PositiveFloat = 0.2
    """The clip range is [1 - clip_low, 1 + clip_high]. 0.1 to 0.3."""
    clip_high: PositiveFloat = 0.2
    """0.2 to 0.4."""


class Clipped(RangeSettings, UsualSettings):
    """A clip range, and the usual advantage."""


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
    loss_N = -(ratio_N * advantage_N).minimum(ratio_N.clamp(limits.low, limits.high) * advantage_N)
    cut_N = ((advantage_N > 0) & (ratio_N > limits.high)) | ((advantage_N < 0) & (ratio_N < limits.low))
    return loss_N, cut_N


def fixed_range(log_ratio_N: Tensor, advantage_N: Tensor, settings: RangeSettings) -> ClipRange:
    """[1 - clip_low, 1 + clip_high], whatever the batch: a `prepare`."""
    return ClipRange(max(1.0 - settings.clip_low, 1e-6), 1.0 + settings.clip_high)


def token_clipped(tokens: Tokens, limits: ClipRange) -> TokenLoss:
    """PPO's objective per token on pi_theta / pi_behaviour: a `token_loss`."""
    return TokenLoss(*clipped_loss(tokens.log_ratio_N, tokens.advantage_N, limits))


class Capped(Clipped):
    """A clip range for pi_theta / pi_proximal, and a cap on the weight pi_proximal / pi_behaviour."""

    weight_cap: PositiveFloat
    """Largest weight pi_proximal / pi_behaviour, 2 to 10."""


@dataclass(frozen=True)
class Ranged:
    """Limits of which one is a clip range."""

    range: ClipRange

    @property
    def cap(self) -> float:
        return self.range.cap


@dataclass(frozen=True)
class Weighted(Ranged):
    weight_cap: float


def weighted_range(log_ratio_N: Tensor, advantage_N: Tensor, settings: Capped) -> Weighted:
    """The fixed range and the fixed cap: a `prepare`."""
    return Weighted(fixed_range(log_ratio_N, advantage_N, settings), settings.weight_cap)
