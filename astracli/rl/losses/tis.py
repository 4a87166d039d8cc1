"""Truncated importance sampling: corrects for an engine that computes other probabilities than the trainer.

loss = -min(w, C) min(u A, clip(u, 1 - low, 1 + high) A) with u = pi_theta / pi_old and w = pi_old / pi_engine, a
constant, pi_old being the *trainer's* probability under the weights that drew the token. Source: Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training", https://fengyao.notion.site/off-policy-rl.

What is available: the engine's log-probabilities, and the trainer's at the start of the step. On a token of the current
version the latter is pi_old itself. On a stale token the trainer no longer holds the weights that drew it, so the
mismatch cannot be told from the staleness: there w = pi_step_start / pi_engine corrects for both, truncated alike, and
u counts from the start of the step. (`decoupled` drops a token over its cap; this one keeps it with the weight C.)
The mismatch alone is the metric `parity_mean_abs`, over the tokens of the current version; `algorithm.mismatch_cap`
corrects for it alone, beside any algorithm (`training/objective.py`).
"""

from __future__ import annotations

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm, TokenLoss, Tokens
from astracli.rl.losses.clipping import Capped, Weighted, clipped_loss, ratio, weighted_range


class Settings(Capped):
    weight_cap: PositiveFloat = 2.0
    """Largest weight pi_proximal / pi_behaviour, 2 to 10. Larger weights are set to it."""


def token_loss(tokens: Tokens, limits: Weighted) -> TokenLoss:
    """The clipped objective around the trainer's own policy, with a truncated weight."""
    loss_N, clipped_N = clipped_loss(tokens.logprob_N - tokens.proximal_N, tokens.advantage_N, limits.range)
    weight_N = ratio(tokens.proximal_N - tokens.behaviour_N)
    return TokenLoss(weight_N.clamp(max=limits.weight_cap) * loss_N, clipped_N, weight_N > limits.weight_cap)


ALGORITHM = Algorithm(settings=Settings, prepare=weighted_range, token_loss=token_loss)
