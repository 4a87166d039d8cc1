"""From the token losses of an algorithm to the loss of a minibatch, one micro-batch at a time.

The parts of a minibatch are summed over micro-batches and ranks, so each is divided by what the *whole* minibatch
holds. Shape letters: N loss tokens, R rows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from astracli.recipe import Recipe
from astracli.rl.batch import Batch, MicroBatch
from astracli.rl.losses import Algorithm, Limits, Normaliser, TokenLoss, Tokens
from astracli.upload import upload


def token_losses(
    algorithm: Algorithm, micro: MicroBatch, logprob_N: Tensor, proximal_N: Tensor | None, limits: Limits
) -> TokenLoss:
    """The algorithm on a micro-batch. Without `proximal_N` the policy has not moved since the start of the step."""
    device = logprob_N.device
    tokens = Tokens(
        logprob_N=logprob_N,
        behaviour_N=upload(micro.logprob_N, device),
        advantage_N=upload(micro.advantage_N, device),
        proximal_N=logprob_N.detach() if proximal_N is None else proximal_N,
        sequence_N=upload(micro.sequence_N, device),
    )
    return algorithm.token_loss(tokens, limits)


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
