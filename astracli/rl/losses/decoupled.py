"""Decoupled PPO for stale data: the trust region is around a recent policy, not the old one that drew the token.

loss = -w min(u A, clip(u, 1 - low, 1 + high) A) with u = pi_theta / pi_proximal and w = pi_proximal / pi_behaviour, a
constant. The proximal policy is the trainer's at the start of the step. Source: arXiv 2505.24298 (AReaL), equation 5,
after arXiv 2110.00641. As in the authors' code a token whose w is over a cap trains nothing.
"""

from __future__ import annotations

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm, TokenLoss, Tokens
from astracli.rl.losses.clipping import Capped, Weighted, clipped_loss, ratio, weighted_range


class Settings(Capped):
    weight_cap: PositiveFloat = 5.0
    """Largest weight pi_proximal / pi_behaviour, 2 to 10. Tokens with a larger weight are not trained on."""


def token_loss(tokens: Tokens, limits: Weighted) -> TokenLoss:
    """The clipped objective around the proximal policy, weighted; no loss where the weight is over its cap."""
    loss_N, clipped_N = clipped_loss(tokens.logprob_N - tokens.proximal_N, tokens.advantage_N, limits.range)
    weight_N = ratio(tokens.proximal_N - tokens.behaviour_N)
    capped_N = weight_N > limits.weight_cap
    return TokenLoss((weight_N * loss_N).masked_fill(capped_N, 0.0), clipped_N, capped_N)


ALGORITHM = Algorithm(settings=Settings, prepare=weighted_range, token_loss=token_loss)
