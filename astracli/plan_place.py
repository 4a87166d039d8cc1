"""What a plan moves off its GPUs, and what an engine may reserve of its own, each with the reason. Pure.

A trainer that does not fit its GPU has three ways to need less of it: the reference waits on the host (used once a
step), a part of AdamW's moments does (used in every update), activations are made again in the backward pass. It takes
those that cost least time (`plan_speed.py`). An engine that shares a GPU reserves what the trainer leaves of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from astracli import plan_memory, plan_trainer
from astracli.adapter import MemoryShape
from astracli.plan_memory import COMFORT, ROOM, MemoryRow, words
from astracli.plan_speed import Pace, step_seconds
from astracli.plan_trainer import Split, Where
from astracli.recipe import Recipe, Recomputed
from astracli.training import link


@dataclass(frozen=True)
class Placement:
    """Decisions about memory on GPUs, as the plan shows them and the processes are told."""

    split: Split = field(default_factory=Split)
    mem_fraction_static: float | None = None
    """What every engine reserves of its GPU; None = not decided (a CPU, or no GPU known)."""
    shared: bool = False
    """Some GPU holds an engine and a trainer: the trainer leaves it alone until the engine has reserved its part."""
    turns: bool = False
    """They take turns on it: what one of them uses for its work is not there during the other's."""
    short: bool = False
    """Moments have to wait on the host, whatever is computed again."""
    reasons: tuple[tuple[str, str, str], ...] = field(default=())
    """(what, where, why)"""


def place(
    recipe: Recipe,
    shape: MemoryShape | None,
    sizes: Mapping[int, int],
    engine_gpus: Sequence[int],
    train_gpus: Sequence[int],
    pace: Pace,
) -> Placement:
    """`sizes`: bytes of each visible GPU; the lists are those that the processes get; `pace`: of the trainer's."""
    fraction = recipe.rollout.mem_fraction_static
    shared = bool(set(engine_gpus) & set(train_gpus))
    if shape is None:
        return Placement(mem_fraction_static=fraction, shared=shared)
    smallest = min((sizes[gpu] for gpu in train_gpus if gpu in sizes), default=None)
    turns = shared and takes_turns(recipe, shape, smallest, len(train_gpus))
    split, short = Split(), False
    reasons: list[tuple[str, str, str]] = []
    if train_gpus and smallest is None:
        split = options(recipe, shape, len(train_gpus), pace)[0]
    elif smallest is not None:
        beside = AWAY if turns else None
        split, short, reasons = _split(recipe, shape, smallest, len(train_gpus), pace, shared, beside)
    if len(train_gpus) > 1:
        without = " ".join(f"{name}={value}" for name, value in link.WITHOUT_PEERS.items())
        proof = f"proved by an all-reduce in {link.LIMIT_S:g} s at the start; if not, once more with {without}"
        reasons.append((f"{len(train_gpus)} ranks", "direct links", proof))
    cards = [sizes[gpu] for gpu in engine_gpus if gpu in sizes]
    if turns and smallest is not None and cards:
        asked = recipe.resources.share_mode == "turns"
        why_turns = "the recipe asks for it" if asked else f"side by side they do not fit {words(smallest)}"
        reasons.append(("engine and trainer", "take turns", why_turns))
        left = smallest - plan_memory.CUDA_CONTEXT - plan_memory.beside_static(shape, recipe)
        fraction = min(fraction, max(0.01, int(100 * ROOM * left / smallest) / 100))
    elif shared and smallest is not None and cards:
        beside = plan_memory.beside_static(shape, recipe)
        trainer = trainer_bytes(recipe, shape, len(train_gpus), split)
        roomy, all_of_it = (int(room * smallest) - trainer - beside for room in (ROOM, 1.0))
        left = roomy if roomy >= plan_memory.static_bytes(shape, recipe) else all_of_it
        derived = max(0.01, int(100 * left / smallest) / 100)
        if derived < fraction:
            fraction = derived
            why_less = f"what the trainer leaves of {words(smallest)}, less {words(beside)} for work"
            reasons.append(("engine", f"reserves {fraction:.0%}", why_less))
    return Placement(split, fraction, shared, turns, short, tuple(reasons))


AWAY = plan_memory.CUDA_GRAPHS + plan_memory.CUDA_CONTEXT
"""What an engine keeps of its GPU while a trainer uses it."""


def takes_turns(recipe: Recipe, shape: MemoryShape, size: int | None, ranks: int) -> bool:
    """Whether they take turns: asked for, or the only way in which both fit."""
    mode = recipe.resources.share_mode
    if mode != "auto" or size is None:
        return mode == "turns"
    need = min(trainer_bytes(recipe, shape, ranks, split) for split in options(recipe, shape, ranks, Pace()))
    return need + AWAY <= size < need + _engine(recipe, shape, 1)


def options(recipe: Recipe, shape: MemoryShape, ranks: int, pace: Pace, *, beside: bool = False) -> list[Split]:
    """Splits that the recipe leaves open, the quickest first. `beside`: an engine runs on the same GPU meanwhile, which
    makes more of memory than the trainer does."""
    asked, used = recipe.train, recipe.algorithm.kl_coef > 0
    modes: Sequence[Recomputed] = ("full",) if beside else ("none", "selective", "full")
    if asked.activation_checkpointing != "auto":
        modes = (asked.activation_checkpointing,)
    references: Sequence[Where] = ("gpu", "host") if used else ("gpu",)
    if asked.reference_device != "auto":
        references = (asked.reference_device,)
    parts = {"auto": PARTS, "gpu": (0.0,), "host": (1.0,)}[asked.optimizer_device]
    splits = [Split(reference, part, mode) for reference in references for part in parts for mode in modes]
    return sorted(splits, key=lambda split: step_seconds(recipe, shape, ranks, split, pace))


PARTS = tuple(twentieths / 20 for twentieths in range(21))
"""Of the moments, that may wait on the host."""


def _part(moments_on_host: float) -> str:
    if moments_on_host in (0.0, 1.0):
        return "host" if moments_on_host else "gpu"
    return f"{moments_on_host:.0%} on the host"


def _split(
    recipe: Recipe, shape: MemoryShape, size: int, ranks: int, pace: Pace, shared: bool, beside: int | None
) -> tuple[Split, bool, list[tuple[str, str, str]]]:
    """(where things lie, whether moments have to wait on the host, [(what, where, reason)]). `beside`: what stays of an
    engine that takes turns."""
    asked, referenced = recipe.train, recipe.algorithm.kl_coef > 0
    apart = not shared or beside is not None
    open_to_us = options(recipe, shape, ranks, pace, beside=not apart)
    needs = {split: trainer_bytes(recipe, shape, ranks, split) for split in open_to_us}
    chosen, fitting = min(open_to_us, key=needs.__getitem__), list[Split]()
    for wanted, room in ((max(1, recipe.rollout.running // COMFORT), ROOM), (1, ROOM), (1, 1.0)):
        engine = beside if beside is not None else _engine(recipe, shape, wanted) if shared else 0
        fitting = [split for split in open_to_us if needs[split] + engine <= room * size]
        if fitting:
            chosen = fitting[0]
            break
    reasons = []
    if asked.activation_checkpointing == "auto":
        why = _quickest(recipe, shape, ranks, pace, fitting, size) if apart else "an engine beside it needs the memory"
        reasons.append(("activations", KEPT[chosen.recomputed], why))
    need = trainer_bytes(recipe, shape, ranks, Split(recomputed=chosen.recomputed))
    no_room = f"with everything on the GPU the trainer needs {words(need)} of {words(size)}"
    for what, asked_for, where, moved in (
        ("reference", asked.reference_device, chosen.reference, referenced and chosen.reference == "host"),
        ("optimizer", asked.optimizer_device, _part(chosen.moments_on_host), chosen.moments_on_host > 0),
    ):
        if moved or (asked_for != "auto" and (referenced or what != "reference")):
            reasons.append((what, where, "the recipe asks for it" if asked_for != "auto" else no_room))
    short = not any(split.moments_on_host == 0 for split in fitting)
    return chosen, short, reasons


KEPT: dict[Recomputed, str] = {
    "none": "kept",
    "selective": "every second block's made again",
    "full": "every block's made again",
}


def _quickest(recipe: Recipe, shape: MemoryShape, ranks: int, pace: Pace, fitting: Sequence[Split], size: int) -> str:
    """How the quickest that fits compares with the other ways to treat activations, each at its best."""
    if not fitting:
        return f"needs least; nothing fits {words(size)}"
    best = {split.recomputed: step_seconds(recipe, shape, ranks, split, pace) for split in reversed(fitting)}
    first = fitting[0].recomputed
    parts = []
    for mode, again in (("none", "none"), ("selective", "every second"), ("full", "every")):
        if mode != first:
            ratio = f"{best[mode] / best[first]:.2f} times as long" if mode in best else "does not fit"
            parts.append(f"{again} again: {ratio}")
    return f"the quickest that fits {words(size)} (estimated); {', '.join(parts)}"


def trainer_bytes(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split) -> int:
    """What a rank needs of its GPU."""
    rows = plan_trainer.trainer_rows("trainer", shape, recipe, "cuda", ranks, split)
    return plan_memory.total(rows, where="gpu", fixed=True)


def _engine(recipe: Recipe, shape: MemoryShape, requests: int) -> int:
    static = plan_memory.static_bytes(shape, recipe, requests=requests)
    return static + plan_memory.beside_static(shape, recipe)


STAYS = ("CUDA graphs", "CUDA context")
"""Rows that stay on a GPU whoever's turn it is."""
PARKED = ("weights (bf16)", plan_trainer.MASTERS, "moments (fp32)", "reference (bf16)")
"""Rows that wait in host memory during the other's turn; the rest is empty then."""


def in_turns(rows: Sequence[MemoryRow], names: Collection[str]) -> list[MemoryRow]:
    """All rows; of the processes that take turns (`names`) what leaves the GPU, and the host memory where it waits."""
    result = []
    for row in rows:
        away = row.process in names and row.where == "gpu" and row.what not in STAYS
        result.append(replace(row, away=away))
        if away and row.what in PARKED:
            result.append(MemoryRow(row.process, f"{row.what}, in the other's turn", "host", row.bytes))
    return result
