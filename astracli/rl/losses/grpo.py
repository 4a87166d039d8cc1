"""GRPO: PPO's clipped objective with group-relative advantages and a fixed clip range. Source: arXiv 2402.03300.

Left out on purpose: the per-sequence mean of the paper (the loss here is a token mean over the minibatch, as in DAPO,
arXiv 2503.14476; `clip_high` > `clip_low` is its clip-higher).
"""

from __future__ import annotations

from astracli.rl.losses import Algorithm
from astracli.rl.losses.clipping import Clipped, fixed_range, token_clipped

ALGORITHM = Algorithm(settings=Clipped, prepare=fixed_range, token_loss=token_clipped)
