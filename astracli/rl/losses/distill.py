"""On-policy distillation: the student samples, and a teacher's log-probabilities are the advantage of each token.

    A = coef (log pi_teacher - log pi_p) + reward_coef A_group      pi_p: the student at the start of the step
    loss of a token = -min(r A, clip(r) A)                          r = pi / pi_b

With r at 1 and `reward_coef` 0, the expectation of the gradient over the student's own samples is that of the reverse
KL(student || teacher) of the next token, as in Gu et al., MiniLLM (arXiv 2306.08543, which adds the tokens behind), and
Agarwal et al., GKD (arXiv 2306.13649, with the student's data alone and reverse KL). In this form, as a per-token
advantage of policy-gradient code: Lu and Thinking Machines Lab, On-Policy Distillation (2025),
https://thinkingmachines.ai/blog/on-policy-distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat, PositiveFloat

from astracli.rl.losses import Algorithm, TokenLoss, Tokens, group_advantage
from astracli.rl.losses.clipping import Clipped, Ranged, fixed_range, token_clipped

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Settings(Clipped):
    teacher: str = Field(min_length=1)
    """The teacher: a local directory, a Hub id, or `astra:tiny`, with the student's tokenizer. It may be of another
    size or family."""
    coef: PositiveFloat = 1.0
    """Weight of log pi_teacher - log pi_student in the advantage of a token."""
    reward_coef: NonNegativeFloat = 0.0
    """Weight of the rewards' usual advantage, which is added. 0: the teacher alone."""


def advantage(rewards_S: np.ndarray, lengths_S: np.ndarray, settings: Settings) -> np.ndarray:
    """The part of the rewards."""
    return settings.reward_coef * group_advantage(rewards_S, lengths_S, settings)


@dataclass(frozen=True)
class Taught(Ranged):
    coef: float
    """Weight of the teacher."""


def prepare(log_ratio_N: Tensor, advantage_N: Tensor, settings: Settings) -> Taught:
    return Taught(fixed_range(log_ratio_N, advantage_N, settings), settings.coef)


def token_loss(tokens: Tokens, limits: Taught) -> TokenLoss:
    """See the head of this file."""
    assert tokens.teacher_N is not None, "the trainer scores the teacher"
    advantage_N = tokens.advantage_N + limits.coef * (tokens.teacher_N - tokens.proximal_N)
    return token_clipped(replace(tokens, advantage_N=advantage_N), limits.range)


ALGORITHM = Algorithm(
    settings=Settings,
    prepare=prepare,
    token_loss=token_loss,
    advantage=advantage,
    teacher=lambda settings: settings.teacher,
    defaults={"drop_equal_groups": False},
    smallest_group=1,
    excluded={"drop_equal_groups": (True, "takes out groups that the teacher has something to say about")},
)
