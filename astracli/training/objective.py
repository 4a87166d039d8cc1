"""From the token losses of an algorithm to the loss of a minibatch, one micro-batch at a time.

The parts of a minibatch are summed over micro-batches and ranks, so each is divided by what the *whole* minibatch
holds.

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

from astracli.config.recipe import AlgorithmTable, Recipe
from astracli.kernels.upload import upload
from astracli.rl.batch import Batch, MicroBatch
from astracli.rl.losses import Algorithm, ClipLimits, Normaliser, TokenLoss, Tokens
from astracli.rl.losses.clipping import ratio


def token_losses(
    algorithm: Algorithm, micro: MicroBatch, logprob_N: Tensor, proximal_N: Tensor | None, limits: ClipLimits
) -> TokenLoss:
    """The algorithm on a micro-batch. Without `proximal_N` the policy has not moved since the start of the step."""
    return algorithm.token_loss(_tokens(micro, logprob_N, proximal_N), limits)


def step_losses(
    algorithm: Algorithm,
    table: AlgorithmTable,
    micro: MicroBatch,
    logprob_N: Tensor,
    proximal_N: Tensor | None,
    limits: ClipLimits,
    version: int,
) -> tuple[TokenLoss, Tensor | None]:
    """What a step trains on: `token_losses`, corrected where the recipe asks for it, and then where the cap was met."""
    if table.mismatch_cap is None:
        return token_losses(algorithm, micro, logprob_N, proximal_N, limits), None
    return corrected_losses(algorithm, micro, logprob_N, proximal_N, limits, version=version, cap=table.mismatch_cap)


def corrected_losses(
    algorithm: Algorithm,
    micro: MicroBatch,
    logprob_N: Tensor,
    proximal_N: Tensor | None,
    limits: ClipLimits,
    *,
    version: int,
    cap: float,
) -> tuple[TokenLoss, Tensor]:
    """The same with mismatch correction, and where pi_old / pi_engine is over `cap` (bool [N]). `version`: of the
    weights at the start of the step."""
    tokens = _tokens(micro, logprob_N, proximal_N)
    own_N = upload(micro.version_N == version, logprob_N.device)
    weight_N = ratio((tokens.proximal_N - tokens.behaviour_N).masked_fill(~own_N, 0.0))
    known = replace(tokens, behaviour_N=tokens.proximal_N.where(own_N, tokens.behaviour_N))
    result = algorithm.token_loss(known, limits)
    return result._replace(loss_N=weight_N.clamp(max=cap) * result.loss_N), weight_N > cap


def _tokens(micro: MicroBatch, logprob_N: Tensor, proximal_N: Tensor | None) -> Tokens:
    device = logprob_N.device
    return Tokens(
        logprob_N=logprob_N,
        behaviour_N=upload(micro.logprob_N, device),
        advantage_N=upload(micro.advantage_N, device),
        proximal_N=logprob_N.detach() if proximal_N is None else proximal_N,
        sequence_N=upload(micro.sequence_N, device),
    )


def moved(log_ratio_N: Tensor, micro: MicroBatch, version: int, table: AlgorithmTable) -> Tensor:
    """From log-ratios to the engine those that `step_losses` gives the algorithm at the start of the step."""
    if table.mismatch_cap is None:
        return log_ratio_N
    return log_ratio_N.masked_fill(upload(micro.version_N == version, log_ratio_N.device), 0.0)


def denominator(normaliser: Normaliser, batch: Batch, index: int, recipe: Recipe) -> float:
    """What the sum over minibatch `index` of all ranks is divided by. A mean over sequences weighs all those of the
    batch alike (`Batch.rows_per_minibatch`)."""
    if normaliser == "token":
        return batch.minibatch_tokens[index]
    if normaliser == "sequence":
        return batch.rows_per_minibatch
    return batch.rows_per_minibatch * (recipe.algorithm.loss_length or recipe.rollout.max_new_tokens)


def normalised(normaliser: Normaliser, loss_N: Tensor, micro: MicroBatch, divisor: float) -> Tensor:
    """This micro-batch's part of the minibatch's loss, a scalar."""
    if normaliser == "sequence":
        sequence_N = micro.sequence_N
        loss_N = loss_N / upload(np.bincount(sequence_N)[sequence_N], loss_N.device)
    return loss_N.sum() / divisor
