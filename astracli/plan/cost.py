"""How long a trainer's step takes, estimated: what the plan weighs memory against when it has the choice. Pure.

Only how two ways of the same step compare has to be right. Figures were measured at 4.2 B parameters on an H200
(docs/benchmarks.md, "The trainer at 4B on one H200").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from astracli.config.recipe import RECOMPUTED_BLOCKS, Recipe
from astracli.machine.facts import Gpu
from astracli.models.adapter import MemoryShape
from astracli.process.layout import Split, recomputed

PEAK = {
    **{"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148},
    **{"A100": 312, "L40S": 362, "L40": 181, "B200": 2250, "B300": 2250},
}
"""Dense bf16 TFLOP/s (vendor's data sheets) by a part of the GPU's name; the first that fits."""
PEAK_OF = {"8.0": 312, "8.6": 150, "8.9": 181, "9.0": 989, "10.0": 2250, "10.3": 2250, "12.0": 210}
"""The same of a GPU whose name says nothing, by compute capability; `USUAL` of others."""
USUAL = 300
REACHED = 0.42
"""Of the peak, in passes that compute nothing twice."""
AGAIN = 0.3
"""What computing all blocks again in the backward pass adds to a step."""
LINK = {8: 50e9, 9: 99e9}
"""Bytes/s between host and GPU, both ways at once, by major compute capability: PCIe 5 x16 from 9 on (measured), 4
before (half of it)."""
TYPICAL = 0.25
"""Of its context, what a sample fills (estimated)."""


@dataclass(frozen=True)
class Pace:
    """Of one GPU."""

    flops: float = REACHED * USUAL * 1e12
    """A second."""
    link: float = LINK[8]
    """Bytes a second to and from the host, together."""


def pace(gpus: Sequence[Gpu]) -> Pace:
    """The slowest of these GPUs."""
    each = [
        Pace(REACHED * peak(gpu.name, gpu.compute_capability) * 1e12, LINK[9 if gpu.capability[0] >= 9 else 8])
        for gpu in gpus
    ]
    return min(each, key=lambda found: found.flops, default=Pace())


def peak(name: str, capability: str | None = None) -> float:
    """Dense bf16 TFLOP/s."""
    known = next((value for part, value in PEAK.items() if part in name), None)
    return known if known is not None else PEAK_OF.get(capability or "", USUAL)


def step_seconds(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split, pace: Pace) -> float:
    """A training step's passes and updates, less what is the same for every split. Copies beside a pass count whole."""
    tokens = recipe.batch_sequences * TYPICAL * recipe.rollout.context_length
    mode = recomputed(recipe, split)
    again = AGAIN / RECOMPUTED_BLOCKS[mode] if mode != "none" else 0.0
    passes = tokens * shape.flops_per_token / ranks / pace.flops * (1.0 + again)
    share = shape.parameters / ranks
    moments = recipe.train.minibatches * 2 * split.moments_on_host * 8 * share / pace.link
    used = recipe.algorithm.kl_coef > 0 and split.reference == "host"
    reference = 2 * share / (pace.link / 2) if used else 0.0
    return passes + moments + reference
