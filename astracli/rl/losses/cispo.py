"""CISPO: the importance weight is bounded and carries no gradient, so every token trains. Source: arXiv 2506.13585.

loss = -sg(min(r, 1 + high)) A log pi_theta, token mean over the minibatch. As in the paper there is no lower bound on
the weight. The paper gives no number for the upper one; 1 + high = 5 is that of ScaleRL
(arXiv 2510.13786).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm, TokenLoss, Tokens, UsualSettings
from astracli.rl.losses.clipping import ratio

if TYPE_CHECKING:
    from torch import Tensor


class Settings(UsualSettings):
    clip_high: PositiveFloat = 4.0
    """The largest importance weight is 1 + clip_high."""


@dataclass(frozen=True)
class Bound:
    """Largest weight of a token."""

    weight: float

    @property
    def cap(self) -> float:
        return math.log(self.weight)


def prepare(log_ratio_N: Tensor, advantage_N: Tensor, settings: Settings) -> Bound:
    """1 + clip_high, whatever the batch."""
    return Bound(1.0 + settings.clip_high)


def token_loss(tokens: Tokens, limits: Bound) -> TokenLoss:
    """Weighted likelihood; `clipped_N` are the tokens whose weight is bounded, they train all the same."""
    ratio_N = ratio(tokens.log_ratio_N.detach())
    loss_N = -ratio_N.clamp(max=limits.weight) * tokens.advantage_N * tokens.logprob_N
    return TokenLoss(loss_N, ratio_N > limits.weight)


ALGORITHM = Algorithm(settings=Settings, prepare=prepare, token_loss=token_loss)
