"""How long a trainer's step takes, estimated: the plan weighs this against memory where it has the choice. Pure.

Only the ratio between two ways to run the same step has to be right. The figures were measured at 4.2 B parameters on
an H200 (docs/benchmarks.md, "The trainer at 4B on one H200").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from astracli.config.recipe import Recipe
from astracli.config.recipe_train import RECOMPUTED_BLOCKS
from astracli.engines import registry as engines
from astracli.machine.facts import Gpu, PeerLink
from astracli.models.adapter import MemoryShape
from astracli.plan.communication import GRADIENT, USUAL_PEERS, WRAPPED, Peers, exchanged, peers
from astracli.process.layout import Split, recomputed

PEAK = {
    **{"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148},
    **{"A100": 312, "L40S": 362, "RTX 4090": 165, "L40": 181, "B200": 2250, "B300": 2250},
}
"""Dense bf16 TFLOP/s (vendor's data sheets) by a part of the GPU's name; the first that matches."""
PEAK_OF = {"8.0": 312, "8.6": 150, "8.9": 181, "9.0": 989, "10.0": 2250, "10.3": 2250, "12.0": 210}
"""The same by compute capability, for a name that is not in `PEAK`; `USUAL` for all others."""
USUAL = 300
REACHED = 0.42
"""The part of the peak that passes reach when nothing is recomputed."""
AGAIN = 0.3
"""How much longer a step takes when the backward pass recomputes all blocks."""
FROZEN = 2 / 3
"""What is left of the passes when the gradients of the weights, a third of all products, are not computed."""
LINK = {8: 50e9, 9: 99e9}
"""Bytes/s between host and GPU, both directions together, by major compute capability: PCIe 5 x16 from 9 on (measured),
PCIe 4 before (half of it)."""
TYPICAL = 0.25
"""The part of its context that a sample fills (estimated)."""


@dataclass(frozen=True)
class Pace:
    """The speed of one GPU."""

    flops: float = REACHED * USUAL * 1e12
    """FLOP/s that passes reach."""
    link: float = LINK[8]
    """Bytes/s to and from the host, together."""
    peers: Peers = USUAL_PEERS
    """To the GPUs of other ranks."""
    inside: Peers = USUAL_PEERS
    """To those of the same host."""


USUAL_PACE = Pace()


@dataclass(frozen=True, eq=False)
class TrainerLoad:
    """What a trainer computes, and on how many GPUs of which speed. Equal loads need the same memory and time."""

    recipe: Recipe
    shape: MemoryShape
    ranks: int
    pace: Pace = USUAL_PACE
    hosts: int = 1
    """Over which the ranks are divided, as many on each."""

    @cached_property
    def _key(self) -> tuple[object, ...]:
        """All of the recipe but what a search for settings changes and no trainer sees: the GPUs of each role and the
        engine's settings."""
        gpus = {"rollout_gpus", "train_gpus", "share_gpus"}
        engine = {"max_running_requests", engines.of(self.recipe).name}
        known = self.recipe.model_dump_json(exclude={"resources": gpus, "rollout": engine})
        return known, self.shape, self.ranks, self.pace, self.hosts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainerLoad) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    @property
    def scores_reference(self) -> bool:
        """Whether it holds initial weights: those of the KL term, or of the matrices that adapters are merged into."""
        return self.recipe.algorithm.kl_coef > 0 or bool(self.shape.adapters)

    def reference_bytes(self, split: Split) -> int:
        """Of the initial weights, a rank."""
        return ceil(2 * (self.shape.adapted or self.shape.parameters) / self.parts(split))

    def parts(self, split: Split) -> int:
        """Ranks that divide something among them."""
        return self.ranks // split.replicas

    def step_seconds(self, split: Split) -> float:
        """Passes and updates of a step, without what is the same for every split. A copy counts whole, even where it
        runs beside a pass."""
        tokens = self.recipe.batch_sequences * TYPICAL * self.recipe.rollout.context_length
        mode = recomputed(self.recipe, split)
        again = AGAIN / RECOMPUTED_BLOCKS[mode] if mode != "none" else 0.0
        frozen = FROZEN if self.shape.adapters else 1.0
        passes = frozen * tokens * self.shape.flops_per_token / self.ranks / self.pace.flops * (1.0 + again)
        share, updates = self.shape.trained / self.parts(split), self.recipe.train.minibatches
        moments = updates * 2 * split.moments_on_host * 8 * share / self.pace.link
        moved = self.scores_reference and split.reference == "host"
        times = updates + (2 if self.recipe.algorithm.kl_coef else 0) if self.shape.adapters else 1
        reference = times * self.reference_bytes(split) / (self.pace.link / 2) if moved else 0.0
        return passes * self._wrapped(split) + moments + reference + self.communication_seconds(split)

    def _wrapped(self, split: Split) -> float:
        return 1.0 + WRAPPED if self.ranks > 1 and split.sharding != "optimizer" else 1.0

    def communication_seconds(self, split: Split) -> float:
        """What the ranks exchange of the policy in a step: gathered weights and summed gradients."""
        if self.ranks == 1:
            return 0.0
        tokens = self.recipe.batch_sequences * TYPICAL * self.recipe.rollout.context_length / self.ranks
        train = self.recipe.train
        moved = exchanged(split.sharding, tokens, train.tokens_per_microbatch, train.minibatches)
        if split.replicas == 1:
            return moved.seconds(self.shape.parameters, self.ranks, self.pace.peers.rate)
        # within a host, then gradients once an update from each host to the next
        inside = moved.seconds(self.shape.parameters, self.parts(split), self.pace.inside.rate)
        summed = train.minibatches * 2 * GRADIENT * self.shape.parameters * (split.replicas - 1) / split.replicas
        return inside + summed / self.pace.peers.rate


def pace(gpus: Sequence[Gpu], link: PeerLink | None = None, network: Peers | None = None) -> Pace:
    """The slowest of these GPUs. `link`: how they reach each other on a host; `network`: between hosts."""
    speeds = ((peak(gpu.name, gpu.compute_capability), LINK[9 if gpu.capability[0] >= 9 else 8]) for gpu in gpus)
    inside = peers(gpus, link)
    between = min(filter(None, [inside, network]), key=lambda found: found.rate)
    each = [Pace(REACHED * tflops * 1e12, rate, between, inside) for tflops, rate in speeds]
    return min(each, key=lambda found: found.flops, default=USUAL_PACE)


def peak(name: str, capability: str | None = None) -> float:
    """Dense bf16 TFLOP/s."""
    known = next((value for part, value in PEAK.items() if part in name), None)
    return known if known is not None else PEAK_OF.get(capability or "", USUAL)
