"""How engines and trainers share GPUs: side by side or by time sharing, what each may take, and why. Pure.

A trainer that does not fit what it may take of its GPU lets something wait on the host or computes it again
(`plan/offload.py`). An engine that shares a GPU reserves what the trainer leaves of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.machine.component import Component
from astracli.machine.memory import MemoryRow, safe, words
from astracli.models.adapter import MemoryShape
from astracli.plan.cost import Pace
from astracli.plan.memory import COMFORT, total
from astracli.plan.offload import KEPT, Choice, Try, choose, options, recomputing, resident, trainer_needs
from astracli.plan.trainer import context_bytes, trainer_rows
from astracli.process.layout import LIMIT_S, WITHOUT_PEERS, Split, Staging


@dataclass(frozen=True)
class Placement:
    """Decisions about memory on GPUs, as the plan shows them and the processes are told."""

    split: Split = field(default_factory=Split)
    mem_fraction_static: float | None = None
    """What every engine reserves of its GPU; None = not decided (a CPU, or no GPU known)."""
    shared: bool = False
    """Some GPU holds an engine and a trainer: the trainer leaves it alone until the engine has reserved its part."""
    time_sharing: bool = False
    """They share it in time: what one uses for its work is not there while the other works."""
    short: bool = False
    """Moments have to wait on the host, whatever is computed again."""
    reasons: tuple[tuple[str, str, str], ...] = field(default=())
    """(what, where, why)"""
    staging: Staging = "file"
    """Where a full version waits beside each engine until its pause (`plan/staging.py`)."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a machine, and those of them that a plan's processes get."""

    sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes of each visible one."""
    engine: Sequence[int] = ()
    trainer: Sequence[int] = ()
    pace: Pace = field(default_factory=Pace)
    """Of the trainer's."""

    @property
    def shared(self) -> bool:
        """Some GPU holds an engine and a trainer."""
        return bool(set(self.engine) & set(self.trainer))

    @property
    def engine_bytes(self) -> int | None:
        """The smallest of the engines'; None when that is not known."""
        return min((self.sizes[gpu] for gpu in self.engine if gpu in self.sizes), default=None)

    @property
    def trainer_bytes(self) -> int | None:
        return min((self.sizes[gpu] for gpu in self.trainer if gpu in self.sizes), default=None)


def place(recipe: Recipe, shape: MemoryShape | None, gpus: Gpus, host: int | None = None) -> Placement:
    """`host`: bytes of host memory that the trainer's ranks may take, None while there is enough."""
    memory = engines.of(recipe).memory
    fraction = memory.share(recipe)
    shared, smallest, ranks = gpus.shared, gpus.trainer_bytes, len(gpus.trainer)
    if shape is None:
        return Placement(mem_fraction_static=fraction, shared=shared)
    time_sharing = shared and shares_time(recipe, shape, smallest, ranks)
    chosen = Choice(Split(), False, [])
    if gpus.trainer:
        every = options(recipe, shape, ranks, gpus.pace)
        if smallest is not None:
            tries = _tries(recipe, shape, smallest, every, shared, time_sharing)

            def over(split: Split) -> int:
                return max(0, _host_bytes(recipe, shape, ranks, split, time_sharing) - (host or 0))

            limited = over if host is not None else None
            chosen = choose(recipe, shape, ranks, gpus.pace, smallest, tries, limited)
        else:
            split = recomputing(resident(every))[0]
            unknown = ("activations", KEPT[split.recomputed], "the memory of its GPU is not known")
            chosen = Choice(split, False, [unknown] if recipe.train.activation_checkpointing == "auto" else [])
    reasons = chosen.reasons
    if ranks > 1:
        without = " ".join(f"{name}={value}" for name, value in WITHOUT_PEERS.items())
        why = f"proved by an all-reduce in {LIMIT_S:g} s at the start; if not, once more with {without}"
        reasons.append((f"{ranks} ranks", "direct links", why))
    if time_sharing and smallest is not None:
        asked = recipe.resources.share_mode == "time_sharing"
        why_time_sharing = "the recipe asks for it" if asked else f"side by side they do not fit {words(smallest)}"
        reasons.append(("engine and trainer", "time sharing", why_time_sharing))
        left = smallest - safe(context_bytes(ranks) + memory.beside(shape, recipe))
        fraction = min(fraction, max(0.01, int(100 * left / smallest) / 100))
    elif shared and smallest is not None:
        beside = memory.beside(shape, recipe)
        least, room = trainer_needs(recipe, shape, ranks, chosen.split)
        roomy, all_of_it = smallest - room - safe(beside), smallest - least - beside
        left = roomy if roomy >= memory.reserved(shape, recipe) else all_of_it
        derived = max(0.01, int(100 * left / smallest) / 100)
        if derived < fraction:
            fraction = derived
            why_less = f"what the trainer leaves of {words(smallest)}, less {words(beside)} for work"
            reasons.append(("engine", f"reserves {fraction:.0%}", why_less))
    return Placement(
        split=chosen.split,
        mem_fraction_static=fraction,
        shared=shared,
        time_sharing=time_sharing,
        short=chosen.short,
        reasons=tuple(reasons),
    )


def shares_time(recipe: Recipe, shape: MemoryShape, size: int | None, ranks: int) -> bool:
    """Whether they share a GPU in time: asked for, or the only way in which both fit."""
    mode = recipe.resources.share_mode
    if mode != "auto" or size is None:
        return mode == "time_sharing"
    engine, least = _engine(recipe, shape, 1), size
    for split in reversed(options(recipe, shape, ranks, Pace())):
        need = trainer_needs(recipe, shape, ranks, split)[0]
        if need + engine <= size:
            return False
        least = min(least, need)
    return least + engines.of(recipe).memory.stays <= size


def _tries(
    recipe: Recipe, shape: MemoryShape, size: int, every: Sequence[Split], shared: bool, time_sharing: bool
) -> list[Try]:
    """Ways to share the GPU between trainer and engine, what is best for both first."""
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


def _host_bytes(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split, time_sharing: bool) -> int:
    """What all ranks need of the host."""
    rows = trainer_rows("trainer", shape, recipe, "cuda", ranks, split)
    if time_sharing:
        rows = time_shared(rows, {"trainer"})
    return ranks * total(rows, where="host", fixed=True)


def _engine(recipe: Recipe, shape: MemoryShape, requests: int) -> int:
    memory = engines.of(recipe).memory
    return memory.reserved(shape, recipe, requests=requests) + memory.beside(shape, recipe)


STAYS = (Component.CUDA_GRAPHS, Component.CUDA_CONTEXT)
"""What stays on a GPU whoever uses it."""
OFFLOADED = (Component.WEIGHTS, Component.MASTERS, Component.MOMENTS, Component.REFERENCE)
"""What waits in host memory while the other uses the GPU; the rest is empty then."""


def time_shared(rows: Sequence[MemoryRow], names: Collection[str]) -> list[MemoryRow]:
    """All rows; of the processes that share it in time (`names`) what leaves the GPU, and where it waits."""
    result = []
    for row in rows:
        away = row.process in names and row.where == "gpu" and row.component not in STAYS
        result.append(replace(row, away=away))
        if away and row.component in OFFLOADED:
            result.append(MemoryRow(row.process, row.component, "host", row.bytes, offloaded=True))
    return result
