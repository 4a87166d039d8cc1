"""Dr. GRPO: GRPO without its two biases. Source: arXiv 2503.20783.

The advantage is r - mean(r), not divided by the spread (which favours prompts that are too easy or too hard), and the
loss of a sequence is its token sum over a constant length, not over its own (which favours long wrong answers). The
constant is `loss_length`, by default the longest completion allowed; it only scales the gradient.
"""

from __future__ import annotations

from astracli.rl.losses import Algorithm
from astracli.rl.losses.clipping import fixed_range, token_clipped

ALGORITHM = Algorithm("dr_grpo", fixed_range, token_clipped, normaliser="constant")
