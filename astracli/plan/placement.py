"""How engines and trainers use GPUs: one each, side by side or by time sharing, and how much of the memory. Pure.

A trainer that does not fit its part of a GPU offloads something to the host or recomputes it (`plan/offload.py`). An
engine that shares a GPU reserves what the trainer leaves of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from astracli.config.recipe import Recipe
from astracli.config.recipe_train import Sharding
from astracli.engines import registry as engines
from astracli.machine.memory import Component, MemoryRow, safe, words
from astracli.models.adapter import MemoryShape
from astracli.plan.communication import DIVIDED
from astracli.plan.cost import USUAL_PACE, Pace, TrainerLoad
from astracli.plan.memory import COMFORT, total
from astracli.plan.offload import (
    KEPT,
    Choice,
    Reason,
    Try,
    choose,
    options,
    recomputing,
    resident,
    shardings,
    trainer_needs,
)
from astracli.plan.seats import GpuId
from astracli.plan.trainer import context_bytes, trainer_rows
from astracli.process.layout import LIMIT_S, RESIDENT, WITHOUT_PEERS, Split, Staging


@dataclass(frozen=True)
class Placement:
    """Decisions about memory on GPUs, as the plan shows them and the processes are told."""

    split: Split = RESIDENT
    mem_fraction_static: float | None = None
    """What every engine reserves of its GPU; None = not decided (a CPU, or no GPU known)."""
    shared: bool = False
    """Some GPU holds an engine and a trainer: the trainer waits until the engine has reserved its part."""
    time_sharing: bool = False
    """They use it by turns: each gives its memory free while the other works."""
    short: bool = False
    """Some moments have to stay on the host, whatever is recomputed."""
    reasons: tuple[Reason, ...] = ()
    staging: Staging = "file"
    """Where a full version waits beside each engine until its pause (`plan/staging.py`)."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a run's hosts, and those of them that a plan's processes get."""

    sizes: Mapping[GpuId, int] = field(default_factory=dict)
    """Bytes of each visible one."""
    engine: Sequence[GpuId] = ()
    trainer: Sequence[GpuId] = ()
    pace: Pace = USUAL_PACE
    """Of the trainer's."""

    @property
    def shared(self) -> bool:
        """Some GPU holds an engine and a trainer."""
        return bool(set(self.engine) & set(self.trainer))

    @property
    def train_hosts(self) -> int:
        return max(1, len({gpu.host for gpu in self.trainer}))

    def smallest(self, gpus: Sequence[GpuId]) -> int | None:
        """Bytes of the smallest of these; None when that is not known."""
        return min((self.sizes[gpu] for gpu in gpus if gpu in self.sizes), default=None)


def place(recipe: Recipe, shape: MemoryShape | None, gpus: Gpus, host: int | None = None) -> Placement:
    """`host`: bytes of memory that the ranks of a host may use there, None while there is enough."""
    memory = engines.of(recipe).memory
    fraction, shared = memory.share(recipe), gpus.shared
    if shape is None:
        return Placement(mem_fraction_static=fraction, shared=shared)
    size, load = gpus.smallest(gpus.trainer), TrainerLoad(recipe, shape, len(gpus.trainer), gpus.pace, gpus.train_hosts)
    time_sharing = shared and shares_time(load, size)
    part = None if host is None else host // max(1, len(gpus.trainer) // gpus.train_hosts)
    chosen = _trainer(load, size, shared, time_sharing, part) if gpus.trainer else Choice(RESIDENT, False, ())
    reasons = list(chosen.reasons)
    if load.ranks > 1:
        without = " ".join(f"{name}={value}" for name, value in WITHOUT_PEERS.items())
        why = f"proved by an all-reduce in {LIMIT_S:g} s at the start; if not, once more with {without}"
        reasons.append(Reason(f"{load.ranks} ranks", "direct links", why))
    if shared and size is not None:
        beside = memory.beside(shape, recipe)
        if time_sharing:
            asked = recipe.resources.share_mode == "time_sharing"
            why = "the recipe asks for it" if asked else f"side by side they do not fit {words(size)}"
            reasons.append(Reason("engine and trainer", "time sharing", why))
            left = size - safe(context_bytes(load.ranks) + beside)
        else:
            least, room = trainer_needs(load, chosen.split)
            roomy, all_of_it = size - room - safe(beside), size - least - beside
            left = roomy if roomy >= memory.reserved(shape, recipe) else all_of_it
        derived = max(0.01, int(100 * left / size) / 100)
        if derived < fraction and not time_sharing:
            why = f"what the trainer leaves of {words(size)}, less {words(beside)} for work"
            reasons.append(Reason("engine", f"reserves {derived:.0%}", why))
        fraction = min(fraction, derived)
    return Placement(
        split=chosen.split,
        mem_fraction_static=fraction,
        shared=shared,
        time_sharing=time_sharing,
        short=chosen.short,
        reasons=tuple(reasons),
    )


def place_on_cpu(recipe: Recipe, ranks: int) -> Placement:
    """Memory is plenty there, and every message between ranks costs: they divide the optimizer alone."""
    way: Sharding = "optimizer" if "optimizer" in (ways := shardings(recipe, ranks)) else ways[0]
    return Placement(split=Split(sharding=way))


def shares_time(load: TrainerLoad, size: int | None) -> bool:
    """Whether engine and trainer use a GPU of `size` bytes by turns: asked for, or the only way in which both fit."""
    mode = load.recipe.resources.share_mode
    if mode != "auto" or size is None:
        return mode == "time_sharing"
    memory = engines.of(load.recipe).memory
    engine = memory.reserved(load.shape, load.recipe) + memory.beside(load.shape, load.recipe)
    least = min(trainer_needs(load, split)[0] for split in options(load))
    return least + engine > size >= least + memory.stays


def _trainer(load: TrainerLoad, size: int | None, shared: bool, time_sharing: bool, host: int | None) -> Choice:
    """How the trainer uses GPUs of which the smallest has `size` bytes. `host`: bytes of host memory for each rank."""
    every = options(load)
    if size is None:
        split = min(recomputing(resident(every)), key=lambda split: trainer_needs(load, split)[0])
        unknown = "the memory of its GPU is not known"
        reasons = [Reason("activations", KEPT[split.recomputed], unknown)]
        if load.recipe.train.activation_checkpointing != "auto":
            reasons = []
        if load.ranks > 1:
            reasons.append(Reason(f"{load.ranks} ranks divide", DIVIDED[split.sharding], unknown))
        return Choice(split, False, reasons)

    def over(split: Split) -> int:
        return max(0, _on_host(load, split, time_sharing) - (host or 0))

    tries = _tries(load, size, every, shared, time_sharing)
    return choose(load, size, tries, over if host is not None else None)


@lru_cache(2**14)
def _on_host(load: TrainerLoad, split: Split, time_sharing: bool) -> int:
    """Bytes that a rank needs of the host."""
    rows = trainer_rows("trainer", load, "cuda", split)
    if time_sharing:
        rows = time_shared(rows, {"trainer"})
    return total(rows, where="host", fixed=True)


def _tries(load: TrainerLoad, size: int, every: Sequence[Split], shared: bool, time_sharing: bool) -> list[Try]:
    """Ways to share the GPU between trainer and engine, what is best for both first."""
    recipe, shape = load.recipe, load.shape
    memory = engines.of(recipe).memory
    if not shared or time_sharing:
        beside = memory.stays if time_sharing else 0
        return [Try(every, size - safe(beside)), Try(every, size - beside, tight=True)]
    requests = recipe.rollout.running
    whole = min(int(memory.share(recipe) * size), memory.reserved(shape, recipe, requests=requests))
    again, because = recomputing(every), "the engine beside it makes more of the memory"
    beside = memory.beside(shape, recipe)
    some, one = (memory.reserved(shape, recipe, requests=n) for n in (max(1, requests // COMFORT), 1))
    return [
        Try(resident(every), size - whole - safe(beside)),
        Try(again, size - some - safe(beside), because=because),
        Try(again, size - one - safe(beside), because=because),
        Try(again, size - one - beside, tight=True, because=because),
    ]


STAYS = (Component.CUDA_GRAPHS, Component.CUDA_CONTEXT)
"""What stays on a GPU whoever uses it."""
OFFLOADED = (
    Component.WEIGHTS, Component.MASTERS, Component.OTHERS_WEIGHTS, Component.MOMENTS, Component.REFERENCE,
    Component.FROZEN_WEIGHTS, Component.TEACHER, Component.BASE, Component.ADAPTERS,
)  # fmt: skip
"""What waits in host memory while the other uses the GPU; the rest is freed then."""


def time_shared(rows: Sequence[MemoryRow], names: Collection[str]) -> list[MemoryRow]:
    """All rows; with those of the processes `names`, which share their GPU in time: what is away, and what it takes of
    the host meanwhile."""
    result = []
    for row in rows:
        away = row.process in names and row.where == "gpu" and row.component not in STAYS
        result.append(replace(row, away=True) if away else row)
        if away and row.component in OFFLOADED:
            result.append(MemoryRow(row.process, row.component, "host", row.bytes, offloaded=True))
    return result
