"""What a trainer keeps on its GPU, offloads to the host or recomputes: the quickest split that fits. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from astracli.config.recipe import Recipe
from astracli.config.recipe_train import Recomputed, Sharding
from astracli.machine.memory import words
from astracli.plan.communication import DIVIDED
from astracli.plan.cost import TrainerLoad
from astracli.plan.memory import expected, padded
from astracli.plan.trainer import trainer_rows
from astracli.process.layout import Split, Where

MODES: Sequence[Recomputed] = ("none", "selective", "full")
KEPT: dict[Recomputed, str] = {"none": "all kept", "selective": "half made again", "full": "all made again"}
"""What a plan says of the activations."""
PARTS = tuple(twentieths / 20 for twentieths in range(21))
"""Parts of the moments that may stay on the host."""
SEVERAL = 1.1
"""What several ranks may need over their plan: the peaks of such runs were within a tenth of it."""


class Reason(NamedTuple):
    """A row of the plan's table of placements."""

    what: str
    where: str
    why: str


@dataclass(frozen=True)
class Try:
    """A way to share a GPU; the first that some split fits is taken."""

    splits: Sequence[Split]
    """The quickest first."""
    available: int
    """Bytes that the trainer may use of its GPU, with the margin of its own estimates."""
    tight: bool = False
    """Without that margin: the split that needs least is taken, not the quickest."""
    because: str = ""
    """Why these splits and no others."""


@dataclass(frozen=True)
class Choice:
    split: Split
    short: bool
    """Some moments have to stay on the host, whatever is recomputed."""
    reasons: Sequence[Reason]


@lru_cache(64)  # a search for settings plans some hundred times, with few different loads
def options(load: TrainerLoad) -> Sequence[Split]:
    """The splits that the recipe allows, the quickest first."""
    asked = load.recipe.train
    modes = MODES if asked.activation_checkpointing == "auto" else (asked.activation_checkpointing,)
    references: Sequence[Where] = ("gpu", "host") if load.scores_reference else ("gpu",)
    if asked.reference_device != "auto":
        references = (asked.reference_device,)
    some = (0.0,) if load.shape.adapters else PARTS  # moments of adapters are small
    parts: Sequence[float] = {"auto": some, "gpu": (0.0,), "host": (1.0,)}[asked.optimizer_device]
    ways = product(references, parts, modes, shardings(load.recipe, load.ranks))
    every = [Split(*way) for way in ways]
    if _may_replicate(load):
        every += [replace(split, replicas=load.hosts) for split in every if split.sharding != "optimizer"]
    return sorted(every, key=load.step_seconds)


def _may_replicate(load: TrainerLoad) -> bool:
    """Whether each host may hold all that its ranks divide. Not in deterministic mode, whose sums are those of one
    host, nor with adapters."""
    return 1 < load.hosts < load.ranks and load.recipe.lora is None and not load.recipe.launch.deterministic


def shardings(recipe: Recipe, ranks: int) -> Sequence[Sharding]:
    """What the recipe allows several ranks to divide. Deterministic mode sums gradients as it always did. Adapters are
    whole on every rank; the frozen weights are divided."""
    if ranks == 1 or recipe.lora is not None:
        return ("full",)
    asked = recipe.train.sharding
    if asked != "auto":
        return (asked,)
    return ("full",) if recipe.launch.deterministic else tuple(DIVIDED)


def resident(splits: Sequence[Split]) -> list[Split]:
    """The splits that leave most on the GPU."""

    def away(split: Split) -> tuple[float, bool]:
        return split.moments_on_host, split.reference == "host"

    least = min(map(away, splits))
    return [split for split in splits if away(split) == least]


def recomputing(splits: Sequence[Split]) -> list[Split]:
    """The splits that recompute most."""
    most = max(splits, key=lambda split: MODES.index(split.recomputed)).recomputed
    return [split for split in splits if split.recomputed == most]


@lru_cache(2**14)  # of some hundred splits for each of those loads
def trainer_needs(load: TrainerLoad, split: Split) -> tuple[int, int]:
    """What a rank needs of its GPU: (at least; all that is expected there, with the margin of its estimates, and of
    several ranks with `SEVERAL`)."""
    there = [row for row in expected(trainer_rows("trainer", load, "cuda", split)) if row.where == "gpu"]
    room, every = sum(map(padded, there)), sum(row.bytes for row in there)
    return sum(row.bytes for row in there if row.fixed), max(room, int(SEVERAL * every)) if load.ranks > 1 else room


def choose(load: TrainerLoad, size: int, tries: Sequence[Try], over: Callable[[Split], int] | None = None) -> Choice:
    """`size`: bytes of the GPU. `over`: by how many bytes a split exceeds the host's memory (0 = it fits); None while
    any split fits there. Where nothing fits, the split that needs least."""
    every = list(dict.fromkeys(split for each in tries for split in each.splits))
    both = {split: trainer_needs(load, split) for split in every}
    needs, rooms = ({split: pair[which] for split, pair in both.items()} for which in (0, 1))
    if over is not None:
        on_gpu = [split for split in every if needs[split] <= tries[-1].available] or every
        missing = {split: over(split) for split in on_gpu}
        needs = {split: needs[split] for split in on_gpu if missing[split] == min(missing.values())}
    least = min(needs, key=needs.__getitem__)
    for each in tries:
        taken = needs if each.tight else rooms
        fitting = [split for split in each.splits if split in needs and taken[split] <= each.available]
        if fitting:
            chosen = min(fitting, key=needs.__getitem__) if each.tight else fitting[0]
            break
    else:
        each, fitting, chosen = tries[-1], [], least
    reasons, asked = [], load.recipe.train
    if asked.activation_checkpointing == "auto":
        where = words(each.available) + (f" of {words(size)}" if each.available < size else "")
        where += (" without a margin" if each.tight else " with its margin") + (" and the host" if over else "")
        why = each.because or _compared(load, chosen, fitting, each.tight, where)
        reasons.append(Reason("activations", KEPT[chosen.recomputed], why))
    need, room = trainer_needs(load, Split(recomputed=chosen.recomputed, sharding=chosen.sharding))
    no_room = (
        f"with everything on the GPU the trainer needs {words(need)}, {words(room)} with its margin; "
        f"it may fill {words(each.available)}"
    )
    part = chosen.moments_on_host
    placed = [("optimizer", asked.optimizer_device, part_words(part), part > 0)]
    if load.ranks > 1 and not load.shape.adapters:
        reasons.append(divided(load, chosen, fitting))
    if load.scores_reference:
        what = "weights without adapters" if load.shape.adapters else "reference"
        placed.insert(0, (what, asked.reference_device, chosen.reference, chosen.reference == "host"))
    for what, asked_for, place, moved in placed:
        if moved or asked_for != "auto":
            reasons.append(Reason(what, place, "the recipe asks for it" if asked_for != "auto" else no_room))
    return Choice(chosen, all(split.moments_on_host > 0 for split in fitting), reasons)


def divided(load: TrainerLoad, chosen: Split, fitting: Sequence[Split]) -> Reason:
    """What the ranks divide among them, and why."""
    what, where = f"{load.ranks} ranks divide", DIVIDED[chosen.sharding]
    if chosen.replicas > 1:
        where += f", among those of a host; {chosen.replicas} hosts hold the same"
    if load.recipe.train.sharding != "auto":
        return Reason(what, where, "the recipe asks for it")
    if load.recipe.launch.deterministic:
        return Reason(what, where, "deterministic mode sums gradients in this order")
    best: dict[Sharding, float] = {}
    for split in fitting:
        best.setdefault(split.sharding, load.step_seconds(split))
    if chosen.sharding not in best:
        return Reason(what, where, "needs least; nothing fits")
    times = {way: f"{seconds / best[chosen.sharding]:.2f} times as long" for way, seconds in best.items()}
    others = [f"{DIVIDED[way]}: {times.get(way, 'no room')}" for way in DIVIDED if way != chosen.sharding]
    spent = load.communication_seconds(chosen) / load.step_seconds(chosen)
    why = f"the quickest that fits over {load.pace.peers.words} (estimated, {spent:.0%} of a step); "
    return Reason(what, where, why + "; ".join(others))


def part_words(moments_on_host: float) -> str:
    if moments_on_host in (0.0, 1.0):
        return "host" if moments_on_host else "gpu"
    return f"{moments_on_host:.0%} on the host"


def _compared(load: TrainerLoad, chosen: Split, fitting: Sequence[Split], tight: bool, where: str) -> str:
    """How the chosen split compares with the best of the other ways to treat activations."""
    if not fitting or tight:
        return f"needs least; {'nothing' if not fitting else 'nothing else'} fits {where}"
    best: dict[Recomputed, float] = {}
    for split in fitting:
        best.setdefault(split.recomputed, load.step_seconds(split))
    ratios = {mode: f"{best[mode] / best[chosen.recomputed]:.2f} times as long" for mode in best}
    parts = [f"{name}: {ratios.get(mode, 'no room')}" for mode, name in KEPT.items() if mode != chosen.recomputed]
    return f"the quickest that fits {where} (estimated); {', '.join(parts)}"
