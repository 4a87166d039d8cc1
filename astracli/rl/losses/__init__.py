"""What a policy-gradient algorithm is. Each is one file with an `ALGORITHM`, an entry point in `astra.algorithms`.

An algorithm works on flat loss tokens. `prepare` sees the whole batch of all ranks, before the first optimizer step,
and returns the limits that hold for all minibatches; `token_loss` sees one micro-batch, whole sequences only. The
trainer turns token losses into the loss of a minibatch (all ranks, all micro-batches) as the `normaliser` says, and
adds `kl` to the initial model where the recipe asks for it.

Three policies occur: the *policy* that is trained, the *proximal* policy (the trainer's at the start of the step), the
*behaviour* policy (the engine's own log-probabilities when it drew the token).

A file of this package imports neither torch nor numpy: `astra recipes show` reads the settings of an algorithm from it.

Shape letters: N loss tokens, R sequences (rows), S samples of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from astracli.config import algorithms
from astracli.config.algorithms import AlgorithmSettings
from astracli.config.recipe_run import Table
from astracli.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EPS = 1e-5
"""Added to every standard deviation: a group whose rewards are all equal gets zeros."""


class UsualSettings(Table):
    """Settings of an algorithm with the usual advantage."""

    advantage: Literal["group", "mean"] = "group"
    """`group`: (r - mean) / (unbiased std + 1e-5) inside the group; `mean`: r - mean."""


def group_advantage(rewards_S: np.ndarray, lengths_S: np.ndarray, settings: UsualSettings) -> np.ndarray:
    """float64 [S], as `settings.advantage` says. One sample alone gets 0."""
    centred_S = mean_advantage(rewards_S, lengths_S, settings)
    if settings.advantage == "mean" or len(rewards_S) < 2:
        return centred_S
    return centred_S / (rewards_S.std(ddof=1) + EPS)


def mean_advantage(rewards_S: np.ndarray, lengths_S: np.ndarray, settings: Any) -> np.ndarray:
    """float64 [S]: r - mean, whatever the settings."""
    return rewards_S - rewards_S.mean()


@dataclass(frozen=True)
class Minibatch:
    """What a normaliser divides by: one minibatch over all ranks."""

    tokens: int
    """Its loss tokens."""
    sequences: float
    """The batch's mean number of sequences a minibatch, so that every sequence of a batch weighs the same."""
    longest: int
    """Tokens of the longest completion allowed."""


@dataclass(frozen=True)
class Normaliser:
    """The loss of a minibatch is sum(loss_N / sequence divisor) / total."""

    total: Callable[[Minibatch, Any], float]
    """`(minibatch, the algorithm's settings)`"""
    of_sequences: Callable[[np.ndarray], np.ndarray] | None = None
    """Numbers of loss tokens [R] -> what each sequence's tokens are divided by [R]; None: by 1."""

    def count(self, lengths_R: np.ndarray) -> np.ndarray:
        """float64 [R]: how often the loss's own mean counts a sequence: its tokens over its divisor, 0 without any."""
        if self.of_sequences is None:
            return lengths_R.astype("float64")
        return lengths_R / self.of_sequences(lengths_R.clip(min=1))


TOKEN_MEAN = Normaliser(lambda minibatch, _: minibatch.tokens)
"""Mean over the tokens of the minibatch."""
SEQUENCE_MEAN = Normaliser(lambda minibatch, _: minibatch.sequences, lambda lengths_R: lengths_R)
"""Mean over its sequences of each one's mean over tokens."""

LARGEST_KL = 10.0
"""Bound of a token's KL: one token cannot take the step."""


def k3(logprob_N: Tensor, reference_N: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) [N], never negative: r - log r - 1 with r = reference / policy. Gradients go
    to `logprob_N`; a token at the bound has none. Source: http://joschu.net/blog/kl-approx.html."""
    log_ratio_N = (reference_N - logprob_N).clamp(-20.0, 20.0)
    return (log_ratio_N.exp() - log_ratio_N - 1.0).clamp(max=LARGEST_KL)


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
    teacher_N: Tensor | None = None
    """A teacher's, for an algorithm that has one."""

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


@dataclass(frozen=True, kw_only=True)
class Algorithm(AlgorithmSettings):
    prepare: Callable[[Tensor, Tensor, Any], ClipLimits]
    """`(log_ratio_N, advantage_N, settings)`, the global batch, without gradients -> limits."""
    token_loss: Callable[[Tokens, Any], TokenLoss]
    """`(tokens of a micro-batch, what prepare returned)`"""
    settings: type[Table] = UsualSettings
    advantage: Callable[[np.ndarray, np.ndarray, Any], np.ndarray] = group_advantage
    """`(rewards_S, loss tokens [S], settings)` of one group -> float64 [S]. The usual one needs `UsualSettings`."""
    normaliser: Normaliser = TOKEN_MEAN
    kl: Callable[[Tensor, Tensor], Tensor] = k3
    """`(log-probabilities, those of the initial model)`, each [N] -> [N], what `kl_coef` weighs."""
    limits_from_ratios: bool = False
    """Whether `prepare` looks at the log-ratios: then they must be the batch's own, so every batch is scored."""


def get(name: str) -> Algorithm:
    """The algorithm of that name. Raises UserError naming those that exist."""
    try:
        found = algorithms.find(name)
    except UserError as error:
        raise UserError(f"algorithm.name = `{name}`: {error.message}", error.hint) from None
    assert isinstance(found, Algorithm), f"{name} has settings and no loss"
    return found
