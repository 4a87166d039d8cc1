"""M2PO: bound the second moment of the log-ratio instead of every ratio. Source: arXiv 2510.01161.

m = (log pi_theta - log pi_behaviour)^2 over the candidates T, the tokens whose ratio already moved the way their
advantage pushes: {A > 0, r > 1} and {A < 0, r < 1}. Three published ways to bring mean(m) down to tau:

- mask (the paper's algorithm 1): drop the largest m until the mean over the rest of T is <= tau;
  loss = mean of M r A.
- waterfill (the authors' code): the cap t with sum(min(m, t^2)) = tau |T| becomes a PPO clip range,
  at least [1 - 0.3, 1 + 0.5].
- clip (AstraFlow): the largest kept |log r| = t becomes the PPO clip range [1 - (1 - e^-t), 1 + (e^t - 1)], the two
  widths at most 0.95 and 20.

Where mean(m) <= tau already, nothing has to be bounded: mask drops no token, waterfill has no range, clip has its
widest.

The sources compute t per micro-batch. Here it is computed once, over the batch of all ranks before the first optimizer
step, and holds for all minibatches (docs/algorithms.md says why). Later minibatches move on, so where something has to
be bounded, t is never under sqrt(tau). That never drops or keeps another token of the batch itself: a token with
m <= tau cannot lift a mean over tau.

Shape letters: N loss tokens of the global batch, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm, ClipLimits, TokenLoss, Tokens, UsualSettings
from astracli.rl.losses.clipping import LOG_RATIO_BOUND, ClipRange, clipped_loss, ratio

if TYPE_CHECKING:
    from torch import Tensor

CLIP_WIDEST = (0.95, 20.0)
WATERFILL_NARROWEST = (0.3, 0.5)
EDGE = 1e-6
"""Relative. The token that sets a range must stay inside it, and its ratio is exp() in fp32, up to 3e-7 off."""


class Settings(UsualSettings):
    variant: Literal["mask", "waterfill", "clip"] = "clip"
    """Which published form of the algorithm (docs/algorithms.md)."""
    m2_threshold: PositiveFloat = 0.01
    """Bound on the second moment of the log-ratio over candidate tokens, 0.003 to 0.04."""


@dataclass(frozen=True)
class Mask:
    """Candidates with |log r| over `cap` are dropped."""

    cap: float


def candidates(log_ratio_N: Tensor, advantage_N: Tensor) -> Tensor:
    """bool [N]: tokens that already moved the way their advantage pushes."""
    return ((advantage_N > 0) & (log_ratio_N > 0)) | ((advantage_N < 0) & (log_ratio_N < 0))


def bounded(moment_C: Tensor, tau: float) -> bool:
    """Whether the mean of the moments is over `tau`; without a candidate it is not."""
    return len(moment_C) > 0 and not float(moment_C.double().mean()) <= tau


def largest_kept(moment_C: Tensor, tau: float) -> float:
    """Cap on |log r|: the largest one kept when the largest moments are dropped until the mean is <= tau."""
    ascending_C = moment_C.double().sort().values
    mean_of_smallest_C = ascending_C.cumsum(0) / _counted(ascending_C)
    kept = int((mean_of_smallest_C <= tau).sum())
    return max(math.sqrt(float(ascending_C[kept - 1])) if kept else 0.0, math.sqrt(tau))


def water_level(moment_C: Tensor, tau: float) -> float:
    """Cap t on |log r| with sum(min(m, t^2)) = tau |C|; the largest |log r| when the mean is under tau as it is, and
    never under the root of tau. Moments may be infinite."""
    count = len(moment_C)
    ascending_C = moment_C.double().sort().values
    if not bounded(moment_C, tau):
        return max(math.sqrt(float(ascending_C[-1])) if count else 0.0, math.sqrt(tau))
    # level_C[k]: t^2 when the k smallest stay as they are and the others are cut; the first that fits under m[k] is it
    below_C = ascending_C.cumsum(0).roll(1)
    below_C[0] = 0.0
    left_C = _counted(ascending_C).flip(0)
    level_C = (tau * count - below_C) / left_C
    fits_C = level_C <= ascending_C
    fits_C[-1] = True  # rounding may put the last level an ulp over the largest moment, where the mean is tau
    return math.sqrt(float(level_C[fits_C.nonzero()[0]]))


def _counted(values_C: Tensor) -> Tensor:
    """1, 2, ... C"""
    return values_C.new_ones(len(values_C)).cumsum(0)


def widths(t: float) -> tuple[float, float]:
    """Of the clip range of ratios whose |log r| is at most t, below and above 1."""
    return -math.expm1(-t), math.expm1(t)


def prepare(log_ratio_N: Tensor, advantage_N: Tensor, settings: Settings) -> ClipLimits:
    """Limits of the batch. Shapes: both [N], the loss tokens of the *global* batch."""
    tau = settings.m2_threshold
    moment_C = log_ratio_N[candidates(log_ratio_N, advantage_N)].double() ** 2
    free = not bounded(moment_C, tau)
    if settings.variant == "mask":
        return Mask(LOG_RATIO_BOUND if free else largest_kept(moment_C, tau))
    if settings.variant == "waterfill":
        low, high = widths(LOG_RATIO_BOUND if free else water_level(moment_C, tau))
        low, high = max(low, WATERFILL_NARROWEST[0]), max(high, WATERFILL_NARROWEST[1])
    else:
        low, high = CLIP_WIDEST if free else widths(largest_kept(moment_C, tau))
        low, high = min(low, CLIP_WIDEST[0]), min(high, CLIP_WIDEST[1])
    return ClipRange(1.0 - low, 1.0 + high)


def token_loss(tokens: Tokens, limits: ClipLimits) -> TokenLoss:
    """Loss per token and the tokens that train nothing."""
    log_ratio_N, advantage_N = tokens.log_ratio_N, tokens.advantage_N
    if isinstance(limits, ClipRange):
        limits = ClipRange(limits.low * (1.0 - EDGE), limits.high * (1.0 + EDGE))
        return TokenLoss(*clipped_loss(log_ratio_N, advantage_N, limits))
    cut_N = candidates(log_ratio_N, advantage_N) & (log_ratio_N.abs() > limits.cap)
    return TokenLoss(-(ratio(log_ratio_N) * advantage_N).masked_fill(cut_N, 0.0), cut_N)


ALGORITHM = Algorithm(settings=Settings, prepare=prepare, token_loss=token_loss, limits_from_ratios=True)
