"""Policy-gradient algorithms, one file each. To add one: write the file, give it a line in `ALGORITHMS`.

An algorithm is two functions on flat loss tokens. `prepare` sees the whole batch of all ranks, before the first
optimizer step, and returns the limits that hold for all minibatches; `token_loss` sees one micro-batch. The trainer
takes the mean of the token losses over the minibatch: all ranks, all micro-batches.

Shape letter: N loss tokens. Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from astracli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from astracli.recipe import AlgorithmTable

ALGORITHMS = {
    "m2po": "astracli.rl.losses.m2po",
    "grpo": "astracli.rl.losses.grpo",
}
"""Name in a recipe -> module that holds `ALGORITHM`."""


class Limits(Protocol):
    """What `prepare` hands to `token_loss`."""

    @property
    def cap(self) -> float:
        """Largest |log ratio| that still trains in the direction of its advantage: the metric `m2_limit`."""
        ...


@dataclass(frozen=True)
class Algorithm:
    name: str
    prepare: Callable[[Tensor, Tensor, AlgorithmTable], Limits]
    """`(log_ratio_N, advantage_N, table)`, the global batch, without gradients -> limits."""
    token_loss: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    """`(log_ratio_N, advantage_N, what prepare returned)` -> (loss_N, clipped_N: where the gradient is cut)."""


def get(name: str) -> Algorithm:
    """The algorithm of that name. Raises UserError naming those that exist."""
    if name not in ALGORITHMS:
        raise UserError(
            f"algorithm.name = `{name}`: there is no such algorithm", f"one of {', '.join(sorted(ALGORITHMS))}"
        )
    algorithm = importlib.import_module(ALGORITHMS[name]).ALGORITHM
    assert isinstance(algorithm, Algorithm)
    return algorithm
