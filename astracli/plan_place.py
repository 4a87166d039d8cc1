"""What a plan moves off its GPUs, and what an engine may reserve of its own, each with the reason. Pure.

A trainer keeps everything on its GPU while that fits. Then its reference goes to the host (used once a step), then one
rank keeps no bf16 parameters beside their masters, then AdamW's moments go (used in every update, four times the
bytes); in all, the fewest of these that fit. An engine that shares a GPU reserves what the trainer
leaves of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from astracli import plan_memory, plan_trainer
from astracli.adapter import MemoryShape
from astracli.plan_memory import COMFORT, ROOM, MemoryRow, words
from astracli.plan_trainer import Split
from astracli.recipe import Recipe
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
    reasons: tuple[tuple[str, str, str], ...] = field(default=())
    """(what, where, why)"""


def place(
    recipe: Recipe,
    shape: MemoryShape | None,
    sizes: Mapping[int, int],
    engine_gpus: Sequence[int],
    train_gpus: Sequence[int],
) -> Placement:
    """`sizes`: bytes of each visible GPU; the lists are those that the processes get."""
    fraction = recipe.rollout.mem_fraction_static
    shared = bool(set(engine_gpus) & set(train_gpus))
    if shape is None:
        return Placement(mem_fraction_static=fraction, shared=shared)
    smallest = min((sizes[gpu] for gpu in train_gpus if gpu in sizes), default=None)
    turns = shared and takes_turns(recipe, shape, smallest, len(train_gpus))
    beside = AWAY if turns else None
    split, why = _split(recipe, shape, smallest, len(train_gpus), shared, beside) if train_gpus else (Split(), [])
    reasons = [(what, getattr(split, what), reason) for what, reason in why]
    if split.wrapped:
        why_wrapped = f"in bf16 beside their masters they need {words(2 * shape.parameters)} more"
        reasons.append(("parameters", "cast in every pass", why_wrapped))
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
    return Placement(split, fraction, shared, turns, tuple(reasons))


AWAY = plan_memory.CUDA_GRAPHS + plan_memory.CUDA_CONTEXT
"""What an engine keeps of its GPU while a trainer uses it."""


def takes_turns(recipe: Recipe, shape: MemoryShape, size: int | None, ranks: int) -> bool:
    """Whether they take turns: asked for, or the only way in which both fit."""
    mode = recipe.resources.share_mode
    if mode != "auto" or size is None:
        return mode == "turns"
    engine = _engine(recipe, shape, 1)
    if any(trainer_bytes(recipe, shape, ranks, option) + engine <= size for option in options(recipe, ranks)):
        return False
    return any(trainer_bytes(recipe, shape, ranks, option) + AWAY <= size for option in options(recipe, ranks))


def options(recipe: Recipe, ranks: int) -> list[Split]:
    """Splits that the recipe leaves open, the quickest first."""
    asked = recipe.train
    referenced = recipe.algorithm.kl_coef > 0
    references = ("gpu", "host") if asked.reference_device == "auto" and referenced else (asked.reference_device,)
    optimizers = ("gpu", "host") if asked.optimizer_device == "auto" else (asked.optimizer_device,)
    return [
        Split("host" if reference == "host" else "gpu", "host" if optimizer == "host" else "gpu", wrapped)
        for optimizer in optimizers
        for wrapped in ((False, True) if ranks == 1 else (False,))
        for reference in references
    ]


def _split(
    recipe: Recipe, shape: MemoryShape, size: int | None, ranks: int, shared: bool, beside: int | None
) -> tuple[Split, list[tuple[str, str]]]:
    """(where things lie, [(what is decided, reason)]). `beside`: what stays of an engine that takes turns."""
    asked, referenced = recipe.train, recipe.algorithm.kl_coef > 0
    open_to_us = options(recipe, ranks)
    first, last = open_to_us[0], open_to_us[-1]
    chosen = first
    if size is not None:
        requests = recipe.rollout.running
        for wanted, room in ((max(1, requests // COMFORT), ROOM), (1, ROOM), (1, 1.0)):
            engine = beside if beside is not None else _engine(recipe, shape, wanted) if shared else 0
            fitting = [
                option for option in open_to_us if trainer_bytes(recipe, shape, ranks, option) + engine <= room * size
            ]
            chosen = fitting[0] if fitting else last
            if fitting:
                break
    reasons = []
    for what, asked_for, there in (
        ("reference", asked.reference_device, referenced),
        ("optimizer", asked.optimizer_device, True),
    ):
        if there and (getattr(chosen, what) == "host" or asked_for != "auto"):
            reasons.append(
                (what, "the recipe asks for it" if asked_for != "auto" else _why(recipe, shape, size, ranks))
            )
    return chosen, reasons


def _why(recipe: Recipe, shape: MemoryShape, size: int | None, ranks: int) -> str:
    need = trainer_bytes(recipe, shape, ranks, Split())
    return f"with everything on the GPU the trainer needs {words(need)} of {words(size or 0)}"


def trainer_bytes(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split) -> int:
    """What a rank needs of its GPU."""
    rows = plan_trainer.trainer_rows("trainer", shape, recipe, "cuda", ranks, split)
    return plan_memory.total(rows, where="gpu", fixed=True)


def _engine(recipe: Recipe, shape: MemoryShape, requests: int) -> int:
    static = plan_memory.static_bytes(shape, recipe, requests=requests)
    return static + plan_memory.beside_static(shape, recipe)


STAYS = ("CUDA graphs", "CUDA context")
"""Rows that stay on a GPU whoever's turn it is."""
PARKED = ("weights (bf16)", "master weights (fp32)", "moments (fp32)", "reference (bf16)")
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
