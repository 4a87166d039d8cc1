"""From the token losses of an algorithm to the loss of a minibatch, one micro-batch at a time.

The parts of a minibatch are summed over micro-batches and ranks, so each part is divided by a figure of the *whole*
minibatch.

Mismatch correction (`algorithm.mismatch_cap`, beside any algorithm): the engine draws with slightly other probabilities
than the trainer's under the same weights. On a token that the current version drew, the trainer's own probability is
known: pi_old, from the start of the step. There the algorithm takes its ratio to pi_old, which is how far the *policy*
moved, and the loss is weighted by min(pi_old / pi_engine, cap), a constant. A token of an older version keeps its ratio
to the engine and the weight 1: the trainer no longer holds the weights that drew it. Source: Yao et al. 2025,
https://fengyao.notion.site/off-policy-rl.

Shape letters: N loss tokens, R rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from astracli.config.recipe import Recipe
from astracli.kernels.upload import upload
from astracli.rl.batch import Batch, MicroBatch
from astracli.rl.losses import Algorithm, ClipLimits, Minibatch, Normaliser, TokenLoss, Tokens
from astracli.rl.losses.clipping import ratio


def token_losses(
    algorithm: Algorithm,
    micro: MicroBatch,
    logprob_N: Tensor,
    proximal_N: Tensor | None,
    limits: ClipLimits,
    *,
    teacher_N: Tensor | None = None,
    version: int = 0,
    cap: float | None = None,
) -> tuple[TokenLoss, Tensor | None]:
    """The algorithm's losses of a micro-batch. With a `cap`: with mismatch correction, and where pi_old / pi_engine is
    over it.

    Without `proximal_N` the policy has not moved since the start of the step. `version`: of the weights then.
    """
    device = logprob_N.device
    tokens = Tokens(
        logprob_N=logprob_N,
        behaviour_N=upload(micro.logprob_N, device),
        advantage_N=upload(micro.advantage_N, device),
        proximal_N=logprob_N.detach() if proximal_N is None else proximal_N,
        sequence_N=upload(micro.sequence_N, device),
        teacher_N=teacher_N,
    )
    if cap is None:
        return algorithm.token_loss(tokens, limits), None
    own_N = upload(micro.version_N == version, device)
    weight_N = ratio((tokens.proximal_N - tokens.behaviour_N).masked_fill(~own_N, 0.0))
    known = replace(tokens, behaviour_N=tokens.proximal_N.where(own_N, tokens.behaviour_N))
    result = algorithm.token_loss(known, limits)
    return result._replace(loss_N=weight_N.clamp(max=cap) * result.loss_N), weight_N > cap


def moved(log_ratio_N: Tensor, micro: MicroBatch, version: int, cap: float | None) -> Tensor:
    """The log-ratios that `token_losses` gives the algorithm at the start of the step, from those to the engine."""
    if cap is None:
        return log_ratio_N
    return log_ratio_N.masked_fill(upload(micro.version_N == version, log_ratio_N.device), 0.0)


def denominator(normaliser: Normaliser, batch: Batch, index: int, recipe: Recipe) -> float:
    """What the sum over minibatch `index` of all ranks is divided by."""
    longest = recipe.rollout.max_new_tokens
    return normaliser.total(
        Minibatch(batch.minibatch_tokens[index], batch.rows_per_minibatch, longest), recipe.algorithm.own
    )


def normalised(normaliser: Normaliser, loss_N: Tensor, micro: MicroBatch, divisor: float) -> Tensor:
    """This micro-batch's part of the minibatch's loss, a scalar."""
    if normaliser.of_sequences is not None:
        sequence_N = micro.sequence_N
        loss_N = loss_N / upload(normaliser.of_sequences(np.bincount(sequence_N))[sequence_N], loss_N.device)
    return loss_N.sum() / divisor
