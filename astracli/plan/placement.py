"""How engines and trainers share GPUs: side by side or by time sharing, what each may take, and why. Pure.

A trainer that does not fit what it may take of its GPU lets something wait on the host or computes it again
(`plan/offload.py`). An engine that shares a GPU reserves what the trainer leaves of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from astracli.config.recipe import Recipe
from astracli.models.adapter import MemoryShape
from astracli.plan import memory as plan_memory
from astracli.plan import offload as plan_split
from astracli.plan import trainer as plan_trainer
from astracli.plan.cost import Pace
from astracli.plan.memory import COMFORT, MemoryRow, safe, words
from astracli.plan.offload import KEPT, Choice, Try, options, recomputing, resident, trainer_needs
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


def place(
    recipe: Recipe,
    shape: MemoryShape | None,
    sizes: Mapping[int, int],
    engine_gpus: Sequence[int],
    train_gpus: Sequence[int],
    pace: Pace,
    host: int | None = None,
) -> Placement:
    """`sizes`: bytes of each visible GPU; the lists are those that the processes get; `pace`: of the trainer's. `host`:
    bytes of host memory that the trainer's ranks may take, None while there is enough."""
    fraction = recipe.rollout.mem_fraction_static
    shared = bool(set(engine_gpus) & set(train_gpus))
    if shape is None:
        return Placement(mem_fraction_static=fraction, shared=shared)
    smallest = min((sizes[gpu] for gpu in train_gpus if gpu in sizes), default=None)
    ranks = len(train_gpus)
    time_sharing = shared and shares_time(recipe, shape, smallest, ranks)
    chosen = Choice(Split(), False, [])
    if train_gpus:
        every = options(recipe, shape, ranks, pace)
        if smallest is not None:
            tries = _tries(recipe, shape, smallest, every, shared, time_sharing)

            def over(split: Split) -> int:
                return max(0, _host_bytes(recipe, shape, ranks, split, time_sharing) - (host or 0))

            limited = over if host is not None else None
            chosen = plan_split.choose(recipe, shape, ranks, pace, smallest, tries, limited)
        else:
            split = recomputing(resident(every))[0]
            unknown = ("activations", KEPT[split.recomputed], "the memory of its GPU is not known")
            chosen = Choice(split, False, [unknown] if recipe.train.activation_checkpointing == "auto" else [])
    reasons = chosen.reasons
    if ranks > 1:
        without = " ".join(f"{name}={value}" for name, value in WITHOUT_PEERS.items())
        why = f"proved by an all-reduce in {LIMIT_S:g} s at the start; if not, once more with {without}"
        reasons.append((f"{ranks} ranks", "direct links", why))
    engine_gpu_bytes = [sizes[gpu] for gpu in engine_gpus if gpu in sizes]
    if time_sharing and smallest is not None and engine_gpu_bytes:
        asked = recipe.resources.share_mode == "time_sharing"
        why_time_sharing = "the recipe asks for it" if asked else f"side by side they do not fit {words(smallest)}"
        reasons.append(("engine and trainer", "time sharing", why_time_sharing))
        left = smallest - safe(plan_trainer.context_bytes(ranks) + plan_memory.beside_static(shape, recipe))
        fraction = min(fraction, max(0.01, int(100 * left / smallest) / 100))
    elif shared and smallest is not None and engine_gpu_bytes:
        beside = plan_memory.beside_static(shape, recipe)
        least, room = trainer_needs(recipe, shape, ranks, chosen.split)
        roomy, all_of_it = smallest - room - safe(beside), smallest - least - beside
        left = roomy if roomy >= plan_memory.static_bytes(shape, recipe) else all_of_it
        derived = max(0.01, int(100 * left / smallest) / 100)
        if derived < fraction:
            fraction = derived
            why_less = f"what the trainer leaves of {words(smallest)}, less {words(beside)} for work"
            reasons.append(("engine", f"reserves {fraction:.0%}", why_less))
    return Placement(chosen.split, fraction, shared, time_sharing, chosen.short, tuple(reasons))


AWAY = plan_memory.CUDA_GRAPHS + plan_memory.CUDA_CONTEXT
"""What an engine keeps of its GPU while a trainer uses it."""


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
    return least + AWAY <= size


def _tries(
    recipe: Recipe, shape: MemoryShape, size: int, every: Sequence[Split], shared: bool, time_sharing: bool
) -> list[Try]:
    """Ways to share the GPU between trainer and engine, what is best for both first."""
    if not shared or time_sharing:
        beside = AWAY if time_sharing else 0
        return [Try(every, size - safe(beside)), Try(every, size - beside, tight=True)]
    requests = recipe.rollout.running
    whole = min(
        int(recipe.rollout.mem_fraction_static * size), plan_memory.static_bytes(shape, recipe, requests=requests)
    )
    again, because = recomputing(every), "the engine beside it makes more of the memory"
    beside = plan_memory.beside_static(shape, recipe)
    some, one = (plan_memory.static_bytes(shape, recipe, requests=n) for n in (max(1, requests // COMFORT), 1))
    return [
        Try(resident(every), size - whole - safe(beside)),
        Try(again, size - some - safe(beside), because=because),
        Try(again, size - one - safe(beside), because=because),
        Try(again, size - one - beside, tight=True, because=because),
    ]


def _host_bytes(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split, time_sharing: bool) -> int:
    """What all ranks need of the host."""
    rows = plan_trainer.trainer_rows("trainer", shape, recipe, "cuda", ranks, split)
    if time_sharing:
        rows = time_shared(rows, {"trainer"})
    return ranks * plan_memory.total(rows, where="host", fixed=True)


def _engine(recipe: Recipe, shape: MemoryShape, requests: int) -> int:
    static = plan_memory.static_bytes(shape, recipe, requests=requests)
    return static + plan_memory.beside_static(shape, recipe)


STAYS = ("CUDA graphs", "CUDA context")
"""Rows that stay on a GPU whoever uses it."""
OFFLOADED = ("weights (bf16)", plan_trainer.MASTERS, "moments (fp32)", "reference (bf16)")
"""Rows that wait in host memory while the other uses the GPU; the rest is empty then."""


def time_shared(rows: Sequence[MemoryRow], names: Collection[str]) -> list[MemoryRow]:
    """All rows; of the processes that share it in time (`names`) what leaves the GPU, and where it waits."""
    result = []
    for row in rows:
        away = row.process in names and row.where == "gpu" and row.what not in STAYS
        result.append(replace(row, away=away))
        if away and row.what in OFFLOADED:
            result.append(MemoryRow(row.process, f"{row.what}, while offloaded", "host", row.bytes))
    return result
