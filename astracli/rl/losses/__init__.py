"""Policy-gradient algorithms, one file each. To add one: write the file, give it a line in `config/algorithms.py`.

An algorithm is two functions on flat loss tokens. `prepare` sees the whole batch of all ranks, before the first
optimizer step, and returns the limits that hold for all minibatches; `token_loss` sees one micro-batch, whole sequences
only. The trainer turns token losses into the loss of a minibatch (all ranks, all micro-batches) as the algorithm's
`normaliser` says.

Three policies occur: the *policy* that is trained, the *proximal* policy (the trainer's at the start of the step), the
*behaviour* policy (the engine's own log-probabilities when it drew the token).

Shape letters: N loss tokens, R sequences (rows). Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from astracli.config.algorithms import ALGORITHMS
from astracli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from astracli.config.recipe import AlgorithmTable

Normaliser = Literal["token", "sequence", "constant"]
"""Mean over the tokens of the minibatch; mean over its sequences of each one's token mean; mean over its sequences of
each one's token sum / a constant length."""


class ClipLimits(Protocol):
    """What `prepare` hands to `token_loss`."""

    @property
    def cap(self) -> float:
        """Largest |log ratio| that still trains in the direction of its advantage: the metric `m2_limit`."""
        ...


@dataclass(frozen=True)
class Tokens:
    """The loss tokens of one micro-batch: log-probabilities under three policies, and whose tokens they are."""

    logprob_N: Tensor
    """The policy's, with gradients."""
    behaviour_N: Tensor
    advantage_N: Tensor
    proximal_N: Tensor
    sequence_N: Tensor
    """int64: 0 .. R - 1, ascending; a sequence is never split."""

    @property
    def log_ratio_N(self) -> Tensor:
        """log pi_theta / pi_behaviour"""
        return self.logprob_N - self.behaviour_N


class TokenLoss(NamedTuple):
    loss_N: Tensor
    clipped_N: Tensor
    """bool: where a clip cuts the gradient (cispo, which cuts none: where it bounds the weight)."""
    capped_N: Tensor | None = None
    """bool: where the weight pi_proximal / pi_behaviour is over its cap; None without such a weight."""


@dataclass(frozen=True)
class Algorithm:
    name: str
    prepare: Callable[[Tensor, Tensor, AlgorithmTable], ClipLimits]
    """`(log_ratio_N, advantage_N, table)`, the global batch, without gradients -> limits."""
    token_loss: Callable[[Tokens, Any], TokenLoss]
    """`(tokens of a micro-batch, what prepare returned)`"""
    normaliser: Normaliser = "token"
    limits_from_ratios: bool = False
    """Whether `prepare` looks at the log-ratios: then they must be the batch's own, so every batch is scored."""
    weighted: bool = False
    """Whether it weighs tokens by pi_proximal / pi_behaviour and says where that weight is capped."""


def get(name: str) -> Algorithm:
    """The algorithm of that name. Raises UserError naming those that exist."""
    if name not in ALGORITHMS:
        raise UserError(
            f"algorithm.name = `{name}`: there is no such algorithm", f"one of {', '.join(sorted(ALGORITHMS))}"
        )
    algorithm = importlib.import_module(f"{__name__}.{name}").ALGORITHM
    assert isinstance(algorithm, Algorithm)
    return algorithm
