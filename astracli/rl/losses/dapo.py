"""DAPO: four changes to GRPO. Source: arXiv 2503.14476.

1. Clip-higher: the range [1 - 0.2, 1 + 0.28] leaves unlikely tokens room to grow.
2. Dynamic sampling: groups whose answers are all right or all wrong are dropped and others generated in their place
   (`drop_equal_groups`, done by the hub on the rewards before shaping).
3. The loss is a token mean over the minibatch.
4. Soft overlong punishment: `overlong_penalty` here, taken off the reward before the advantage is computed.

Rewards are 0 and 1 in this package and -1 and 1 in the paper, so the largest penalty is half of the paper's: group-
normalised advantages are then the same.

Left out: filtering of truncated samples, which the paper compares with the soft punishment and does not combine.
"""

from __future__ import annotations

from pydantic import PositiveFloat

from astracli.rl.losses import Algorithm
from astracli.rl.losses.clipping import Clipped, fixed_range, token_clipped


class Settings(Clipped):
    clip_high: PositiveFloat = 0.28
    """0.2 to 0.4."""


ALGORITHM = Algorithm(
    settings=Settings,
    prepare=fixed_range,
    token_loss=token_clipped,
    defaults={"overlong_fraction": 0.2},
    excluded={"drop_equal_groups": (False, "takes dynamic sampling out")},
)
