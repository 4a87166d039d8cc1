"""Dr. GRPO: GRPO without its two biases. Source: arXiv 2503.20783.

The advantage is r - mean(r), not divided by the spread (which favours prompts that are too easy or too hard), and the
loss of a sequence is its token sum over a constant length, not over its own (which favours long wrong answers). The
constant is `loss_length`, by default the longest completion allowed; it only scales the gradient.
"""

from __future__ import annotations

from pydantic import PositiveInt

from astracli.rl.losses import Algorithm, Minibatch, Normaliser, mean_advantage
from astracli.rl.losses.clipping import RangeSettings, fixed_range, token_clipped


class Settings(RangeSettings):
    loss_length: PositiveInt | None = None
    """The loss of a sequence is summed over its tokens and divided by this number. None: `rollout.max_new_tokens`."""


def total(minibatch: Minibatch, settings: Settings) -> float:
    """Mean over the sequences of the minibatch, of each one's token sum / the constant."""
    return minibatch.sequences * (settings.loss_length or minibatch.longest)


ALGORITHM = Algorithm(
    settings=Settings,
    prepare=fixed_range,
    token_loss=token_clipped,
    advantage=mean_advantage,
    normaliser=Normaliser(total),
    excluded={"batch_norm_advantage": (True, "divides by the spread of the rewards")},
)
