"""GSPO: one importance ratio per sequence, the geometric mean of its tokens' ratios. Source: arXiv 2507.18071.

s = (pi_theta(y) / pi_behaviour(y))^(1 / |y|); loss of a sequence = -min(s A, clip(s, 1 - low, 1 + high) A); mean over
sequences. Being a mean, log s moves far less than a token's log-ratio: the paper's range is [1 - 3e-4, 1 + 4e-4].

Every token of a sequence carries the sequence's loss; the token mean that the normaliser takes gives it back, with the
gradient of all its tokens.
"""

from __future__ import annotations

from pydantic import PositiveFloat

from astracli.rl.losses import SEQUENCE_MEAN, Algorithm, TokenLoss, Tokens
from astracli.rl.losses.clipping import Clipped, ClipRange, clipped_loss, fixed_range


class Settings(Clipped):
    clip_low: PositiveFloat = 3e-4
    """The clip range of s is [1 - clip_low, 1 + clip_high]."""
    clip_high: PositiveFloat = 4e-4
    """As in the paper. s changes far less than the ratio of one token, so usual ranges would never be reached."""


def token_loss(tokens: Tokens, limits: ClipRange) -> TokenLoss:
    """The sequence's loss at each of its tokens."""
    # as many places as tokens, of which sequences take the first: to count them a GPU would have to be waited for
    zeros_N = tokens.behaviour_N.new_zeros(tokens.behaviour_N.shape)
    lengths_N = zeros_N.index_add(0, tokens.sequence_N, zeros_N + 1.0)
    sums_N = zeros_N.index_add(0, tokens.sequence_N, tokens.log_ratio_N)
    mean_N = (sums_N / lengths_N.clamp(min=1))[tokens.sequence_N]
    return TokenLoss(*clipped_loss(mean_N, tokens.advantage_N, limits))


ALGORITHM = Algorithm(settings=Settings, prepare=fixed_range, token_loss=token_loss, normaliser=SEQUENCE_MEAN)
