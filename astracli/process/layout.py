"""Where a trainer keeps what it does not always need, the sizes of what passes through its GPU, and its ranks' start.

Nothing here imports torch: the plan counts with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from astracli.config.recipe import Recipe
from astracli.config.recipe_train import Recomputed, Sharding

Where = Literal["gpu", "host"]
Staging = Literal["gpu", "host", "file"]
"""Where a full version waits beside an engine until its pause."""

LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""fp32 logits of one chunk in the trainer's loss; with what lives beside them three times that."""
BUCKET_BYTES = 2**29
"""What passes through the GPU together in an update: masters made whole, moments that wait on the host. Of
one tensor it may be more."""
BUCKETS_IN_FLIGHT = 3
"""Buckets of moments on the GPU at once: one comes, one is worked on, one leaves."""
MERGED_TOGETHER = 2**22
"""Elements of a matrix on a GPU that an adapter is merged into at once: what that needs in fp32 stays in its cache."""
WITHOUT_PEERS = {"NCCL_P2P_DISABLE": "1"}
"""Environment of ranks that do not reach each other directly."""
LIMIT_S = 60.0
"""For the ranks' first all-reduce, from the moment at which all have met; NCCL's own start is in it."""


@dataclass(frozen=True)
class Split:
    """Where what a trainer does not always need lies: on its GPU, in pinned host memory and moved in when used, or
    nowhere and computed again."""

    reference: Where = "gpu"
    moments_on_host: float = 0.0
    """Which part of AdamW's moments."""
    recomputed: Recomputed = "none"
    """Of the blocks' activations, where the recipe leaves it open."""
    sharding: Sharding = "full"
    """What several ranks divide among them; one rank divides nothing."""
    replicas: int = 1
    """Hosts of which each has all of it: the ranks of a host divide it among themselves, and hosts sum gradients. 1:
    all ranks divide it."""


RESIDENT = Split()
"""Everything on the GPU."""


def recomputed(recipe: Recipe, split: Split) -> Recomputed:
    """What the backward pass computes again."""
    asked = recipe.train.activation_checkpointing
    return split.recomputed if asked == "auto" else asked
