"""GSPO: one importance ratio per sequence, the geometric mean of its tokens' ratios. Source: arXiv 2507.18071.

s = (pi_theta(y) / pi_behaviour(y))^(1 / |y|); loss of a sequence = -min(s A, clip(s, 1 - low, 1 + high) A); mean over
sequences. Being a mean, log s moves far less than a token's log-ratio: the paper's range is [1 - 3e-4, 1 + 4e-4].

Every token of a sequence carries the sequence's loss; the token mean that the normaliser takes gives it back, with the
gradient of all its tokens.
"""

from __future__ import annotations

import torch

from astracli.rl.losses import Algorithm, TokenLoss, Tokens
from astracli.rl.losses.clipping import ClipRange, clipped_loss, fixed_range


def token_loss(tokens: Tokens, limits: ClipRange) -> TokenLoss:
    """The sequence's loss at each of its tokens."""
    # as many places as tokens, of which sequences take the first: to count them a GPU would have to be waited for
    zeros_N = torch.zeros_like(tokens.behaviour_N)
    lengths_N = zeros_N.index_add(0, tokens.sequence_N, torch.ones_like(zeros_N))
    sums_N = zeros_N.index_add(0, tokens.sequence_N, tokens.log_ratio_N)
    mean_N = (sums_N / lengths_N.clamp(min=1))[tokens.sequence_N]
    return TokenLoss(*clipped_loss(mean_N, tokens.advantage_N, limits))


ALGORITHM = Algorithm("gspo", fixed_range, token_loss, normaliser="sequence")
