"""RLOO for astra: REINFORCE whose baseline is the mean reward of the other samples. Source: arXiv 2402.14740."""

import math
from dataclasses import dataclass

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm, Normaliser, Table, TokenLoss


class Settings(Table):
    weight_cap: PositiveFloat = 2.0
    """Largest weight of a token: its probability now, divided by its probability under the engine that drew it."""


@dataclass(frozen=True)
class Limits:
    cap: float
    """Largest log-ratio whose weight is not cut."""


def prepare(log_ratio_N, advantage_N, settings):
    return Limits(math.log(settings.weight_cap))


def token_loss(tokens, limits):
    log_ratio_N = tokens.log_ratio_N.detach()
    weight_N = log_ratio_N.clamp(max=limits.cap).exp()
    return TokenLoss(-weight_N * tokens.advantage_N * tokens.logprob_N, log_ratio_N > limits.cap)


def leave_one_out(rewards_S, lengths_S, settings):
    return rewards_S - (rewards_S.sum() - rewards_S) / (len(rewards_S) - 1)


ALGORITHM = Algorithm(
    settings=Settings,
    prepare=prepare,
    token_loss=token_loss,
    advantage=leave_one_out,
    normaliser=Normaliser(lambda minibatch, settings: minibatch.sequences),  # a sum over tokens, a mean over sequences
)
