"""M2PO: bound the second moment of the log-ratio instead of every ratio. Source: arXiv 2510.01161.

m = (log pi_theta - log pi_behaviour)^2 over the candidates T, the tokens whose ratio already moved the way their
advantage pushes: {A > 0, r > 1} and {A < 0, r < 1}. Three published ways to keep mean(m) at or under tau:

- mask (the paper's algorithm 1): drop the largest m until the mean over the rest of T is <= tau;
  loss = mean of M r A.
- waterfill (the authors' code): the cap t with sum(min(m, t^2)) = tau |T| becomes a PPO clip range,
  at least [1 - 0.3, 1 + 0.5].
- clip (AstraFlow): the largest kept |log r| = t becomes the PPO clip range [1 - (1 - e^-t), 1 + (e^t - 1)], the two
  widths at most 0.95 and 20.

The sources compute t per micro-batch. Here it is computed once, over the batch of all ranks before the first optimizer
step, and holds for all minibatches. On fresh data all log-ratios of that pass are near 0, and so would be the largest
kept one: the first optimizer step would freeze the later minibatches. So t is never under sqrt(tau). That never drops
or keeps another token of the batch itself: a token with m <= tau cannot lift a mean over tau.

Shape letters: N loss tokens of the global batch, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from astracli.recipe import AlgorithmTable
from astracli.rl.losses import Algorithm, Limits, TokenLoss, Tokens
from astracli.rl.losses.clipping import Range, clipped_loss, ratio

CLIP_WIDEST = (0.95, 20.0)
WATERFILL_NARROWEST = (0.3, 0.5)


@dataclass(frozen=True)
class Mask:
    """Candidates with |log r| over `cap` are dropped."""

    cap: float


def candidates(log_ratio_N: Tensor, advantage_N: Tensor) -> Tensor:
    """bool [N]: tokens that already moved the way their advantage pushes."""
    return ((advantage_N > 0) & (log_ratio_N > 0)) | ((advantage_N < 0) & (log_ratio_N < 0))


def largest_kept(moment_C: Tensor, tau: float) -> float:
    """Cap on |log r|: the largest one kept when the largest moments are dropped until the mean is <= tau."""
    ascending_C = moment_C.double().sort().values
    mean_of_smallest_C = ascending_C.cumsum(0) / torch.arange(1, len(ascending_C) + 1, device=moment_C.device)
    kept = int((mean_of_smallest_C <= tau).sum())
    return max(math.sqrt(float(ascending_C[kept - 1])) if kept else 0.0, math.sqrt(tau))


def water_level(moment_C: Tensor, tau: float) -> float:
    """Cap t on |log r| with sum(min(m, t^2)) = tau |C|; the largest |log r| when the mean is under tau as it is."""
    count = len(moment_C)
    if count == 0:
        return math.sqrt(tau)
    ascending_C = moment_C.double().sort().values
    if float(ascending_C.mean()) <= tau:
        return max(math.sqrt(float(ascending_C[-1])), math.sqrt(tau))
    # level_C[k]: t^2 when the k smallest stay as they are and the others are cut; the first that fits under m[k] is it
    below_C = ascending_C.cumsum(0) - ascending_C
    left_C = count - torch.arange(count, device=moment_C.device)
    level_C = (tau * count - below_C) / left_C
    first = int((level_C <= ascending_C).nonzero()[0])
    return math.sqrt(float(level_C[first]))


def prepare(log_ratio_N: Tensor, advantage_N: Tensor, table: AlgorithmTable) -> Limits:
    """Limits of the batch. Shapes: both [N], the loss tokens of the *global* batch."""
    chosen_N = candidates(log_ratio_N, advantage_N)
    moment_C = log_ratio_N[chosen_N].double() ** 2
    if table.variant == "waterfill":
        t = water_level(moment_C, table.m2_threshold)
        low, high = (max(w, n) for w, n in zip((-math.expm1(-t), math.expm1(t)), WATERFILL_NARROWEST, strict=True))
        return Range(1.0 - low, 1.0 + high)
    t = largest_kept(moment_C, table.m2_threshold)
    if table.variant == "mask":
        return Mask(t)
    low, high = (min(w, m) for w, m in zip((-math.expm1(-t), math.expm1(t)), CLIP_WIDEST, strict=True))
    return Range(1.0 - low, 1.0 + high)


def token_loss(tokens: Tokens, limits: Limits) -> TokenLoss:
    """Loss per token and the tokens that train nothing."""
    log_ratio_N, advantage_N = tokens.log_ratio_N, tokens.advantage_N
    if isinstance(limits, Range):
        return TokenLoss(*clipped_loss(log_ratio_N, advantage_N, limits))
    cut_N = candidates(log_ratio_N, advantage_N) & (log_ratio_N.abs() > limits.cap)
    return TokenLoss(-(ratio(log_ratio_N) * advantage_N).masked_fill(cut_N, 0.0), cut_N)


ALGORITHM = Algorithm("m2po", prepare, token_loss)
