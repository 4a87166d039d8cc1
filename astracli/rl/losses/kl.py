"""The k3 estimate of KL(policy || reference), per token: r - log r - 1 with r = reference / policy.

Source: http://joschu.net/blog/kl-approx.html. Never negative, and bounded by 10 so that one token cannot take the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 10.0


def k3(logprob_N: Tensor, reference_N: Tensor) -> Tensor:
    """[N], with gradients to `logprob_N`; a token at the bound has none."""
    log_ratio_N = (reference_N - logprob_N).clamp(-20.0, 20.0)
    return (log_ratio_N.exp() - log_ratio_N - 1.0).clamp(-LARGEST, LARGEST)
