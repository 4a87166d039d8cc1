"""What a trainer keeps on its GPU, lets wait on the host or computes again: the quickest of what fits. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from astracli.config.recipe import Recipe, Recomputed
from astracli.machine.memory import words
from astracli.models.adapter import MemoryShape
from astracli.plan.cost import Pace, step_seconds
from astracli.plan.memory import expected, padded
from astracli.plan.trainer import trainer_rows
from astracli.process.layout import Split, Where

MODES: Sequence[Recomputed] = ("none", "selective", "full")
KEPT: dict[Recomputed, str] = {"none": "all kept", "selective": "half made again", "full": "all made again"}
"""What becomes of activations."""
PARTS = tuple(twentieths / 20 for twentieths in range(21))
"""Of the moments, that may wait on the host."""


@dataclass(frozen=True)
class Try:
    """A way to share a GPU; the first that some split fits is taken."""

    splits: Sequence[Split]
    """The quickest first."""
    available: int
    """Bytes that the trainer may take of its GPU, with the margin of its own estimates."""
    tight: bool = False
    """Without that margin: the least is taken, not the quickest."""
    because: str = ""
    """Why these splits and no others."""


@dataclass(frozen=True)
class Choice:
    split: Split
    short: bool
    """Moments have to wait on the host, whatever is computed again."""
    reasons: list[tuple[str, str, str]]
    """(what, where, why)"""


def options(recipe: Recipe, shape: MemoryShape, ranks: int, pace: Pace) -> list[Split]:
    """Splits that the recipe leaves open, the quickest first."""
    asked, used = recipe.train, recipe.algorithm.kl_coef > 0
    modes = MODES if asked.activation_checkpointing == "auto" else (asked.activation_checkpointing,)
    references: Sequence[Where] = ("gpu", "host") if used else ("gpu",)
    if asked.reference_device != "auto":
        references = (asked.reference_device,)
    parts = {"auto": PARTS, "gpu": (0.0,), "host": (1.0,)}[asked.optimizer_device]
    splits = [Split(reference, part, mode) for reference in references for part in parts for mode in modes]
    return sorted(splits, key=lambda split: step_seconds(recipe, shape, ranks, split, pace))


def resident(splits: Sequence[Split]) -> list[Split]:
    """Those that leave as much on the GPU as any."""

    def away(split: Split) -> tuple[float, bool]:
        return split.moments_on_host, split.reference == "host"

    least = min(map(away, splits))
    return [split for split in splits if away(split) == least]


def recomputing(splits: Sequence[Split]) -> list[Split]:
    """Those that compute as much again as any."""
    most = max(splits, key=lambda split: MODES.index(split.recomputed)).recomputed
    return [split for split in splits if split.recomputed == most]


def trainer_needs(recipe: Recipe, shape: MemoryShape, ranks: int, split: Split) -> tuple[int, int]:
    """What a rank needs of its GPU: (at least; of all that is expected there, with the margin of its estimates)."""
    rows = trainer_rows("trainer", shape, recipe, "cuda", ranks, split)
    there = [row for row in expected(rows) if row.where == "gpu"]
    return sum(row.bytes for row in there if row.fixed), sum(map(padded, there))


def choose(
    recipe: Recipe,
    shape: MemoryShape,
    ranks: int,
    pace: Pace,
    size: int,
    tries: Sequence[Try],
    over: Callable[[Split], int] | None = None,
) -> Choice:
    """`size`: bytes of the GPU; `over`: by how many bytes a split is over the host's memory (0 = it fits), None while
    there is enough for any. Where nothing fits, what needs least."""
    every = list(dict.fromkeys(split for each in tries for split in each.splits))
    both = {split: trainer_needs(recipe, shape, ranks, split) for split in every}
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
    reasons = []
    if recipe.train.activation_checkpointing == "auto":
        where = words(each.available) + (f" of {words(size)}" if each.available < size else "")
        where += (" without a margin" if each.tight else " with its margin") + (" and the host" if over else "")
        why = each.because or _compared(recipe, shape, ranks, pace, chosen, fitting, each.tight, where)
        reasons.append(("activations", KEPT[chosen.recomputed], why))
    need, room = trainer_needs(recipe, shape, ranks, Split(recomputed=chosen.recomputed))
    no_room = (
        f"with everything on the GPU the trainer needs {words(need)}, {words(room)} with its margin; "
        f"it may fill {words(each.available)}"
    )
    for what, asked_for, place, moved in (
        ("reference", recipe.train.reference_device, chosen.reference, chosen.reference == "host"),
        ("optimizer", recipe.train.optimizer_device, part_words(chosen.moments_on_host), chosen.moments_on_host > 0),
    ):
        if what == "reference" and not recipe.algorithm.kl_coef:
            continue
        if moved or asked_for != "auto":
            reasons.append((what, place, "the recipe asks for it" if asked_for != "auto" else no_room))
    return Choice(chosen, not any(split.moments_on_host == 0 for split in fitting), reasons)


def part_words(moments_on_host: float) -> str:
    if moments_on_host in (0.0, 1.0):
        return "host" if moments_on_host else "gpu"
    return f"{moments_on_host:.0%} on the host"


def _compared(
    recipe: Recipe,
    shape: MemoryShape,
    ranks: int,
    pace: Pace,
    chosen: Split,
    fitting: Sequence[Split],
    tight: bool,
    where: str,
) -> str:
    """How the chosen split compares with the best of the other ways to treat activations."""
    if not fitting or tight:
        return f"needs least; {'nothing' if not fitting else 'nothing else'} fits {where}"
    best: dict[Recomputed, float] = {}
    for split in fitting:
        best.setdefault(split.recomputed, step_seconds(recipe, shape, ranks, split, pace))
    parts = []
    for mode, name in KEPT.items():
        if mode != chosen.recomputed:
            ratio = best[mode] / best[chosen.recomputed] if mode in best else None
            parts.append(f"{name}: " + ("no room" if ratio is None else f"{ratio:.2f} times as long"))
    return f"the quickest that fits {where} (estimated); {', '.join(parts)}"
