"""Settings with which a plan that does not fit would fit: other splits of the GPUs, smaller values, each tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from itertools import accumulate
from operator import or_
from typing import Any

from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.plan.types import TRAINING

Sets = dict[str, Any]
"""Dotted key -> value"""


class Fit(Enum):
    """How well a recipe fits a machine."""

    NOT = auto()
    TIGHTLY = auto()
    """Without the margin of its estimates, or some moments have to stay on the host, which costs time in every
    update."""
    WELL = auto()


def find(recipe: Recipe, command: str, gpus: int, fit: Callable[[Recipe], Fit], others: int = 0) -> Sets | None:
    """The fewest settings with which the recipe fits `gpus` GPUs well, else tightly; None when it fits with none.
    `others`: GPUs of other hosts, which serve engines."""
    tight: Sets | None = None
    for placement in _over_hosts(recipe, gpus, others) if others else _placements(recipe, command, gpus):
        for smaller in _smaller(recipe, command):
            sets = placement | smaller
            found = fit(changed(recipe, sets)) if sets else Fit.NOT
            if found is Fit.WELL:
                return _fewest(recipe, sets, lambda other: fit(other) is Fit.WELL)
            if found is Fit.TIGHTLY and tight is None:
                tight = sets
    return _fewest(recipe, tight, lambda other: fit(other) is not Fit.NOT) if tight else None


def command_line(command: str, name: str, sets: Sets) -> str:
    words = " ".join(f"--set {key}={str(value).lower()}" for key, value in sets.items())
    return f"`astra {command} --recipe {name} {words}`"


def changed(recipe: Recipe, sets: Sets) -> Recipe:
    """The recipe with dotted keys set."""
    for key, value in sets.items():
        recipe = _with(recipe, key.split("."), value)
    return recipe


def _with(table: Any, keys: list[str], value: Any) -> Any:
    name, *rest = keys
    return table.model_copy(update={name: _with(getattr(table, name), rest, value) if rest else value})


def _fewest(recipe: Recipe, sets: Sets, accepted: Callable[[Recipe], bool]) -> Sets:
    """`sets` without those that are not needed."""
    for key in list(sets):
        fewer = {name: value for name, value in sets.items() if name != key}
        if fewer and accepted(changed(recipe, fewer)):
            sets = fewer
    return sets


def _placements(recipe: Recipe, command: str, gpus: int) -> Iterator[Sets]:
    """Splits of `gpus` GPUs: the recipe's own, then near halves, then more training GPUs, then one shared."""
    own = recipe.resources
    if own.rollout_gpus + (own.train_gpus if command in TRAINING else 0) <= gpus or own.share_gpus:
        yield {}
    if command not in TRAINING:
        if gpus:
            yield {"resources.rollout_gpus": gpus}
        return
    for rollout in sorted(range(1, gpus), key=lambda r: abs(2 * r - gpus)):
        yield {"resources.rollout_gpus": rollout, "resources.train_gpus": gpus - rollout, "resources.share_gpus": False}
    for count in dict.fromkeys((1, gpus) if gpus else ()):
        yield {"resources.rollout_gpus": count, "resources.train_gpus": count, "resources.share_gpus": True}


def _over_hosts(recipe: Recipe, first: int, others: int) -> Iterator[Sets]:
    """Splits of GPUs of several hosts: the recipe's own, then its trainer with all other GPUs for engines, then all of
    the first host for the trainer, then fewer."""
    yield {}
    own = recipe.resources.train_gpus
    for train in dict.fromkeys([*([own] if own <= first else []), *range(first, 0, -1)]):
        splits = {"resources.rollout_gpus": others + first - train, "resources.train_gpus": train}
        yield splits | {"resources.share_gpus": False, "resources.train_hosts": 1}


def _smaller(recipe: Recipe, command: str) -> Iterator[Sets]:
    """Settings that need less memory and train the same, one more each time."""
    steps: list[Sets] = [{}]
    train, rollout = recipe.train, recipe.rollout
    if command in TRAINING:
        fixed = {"activation_checkpointing": ("none", "selective"), "reference_device": ("gpu",)}
        fixed |= {"optimizer_device": ("gpu",)}
        steps += [{f"train.{key}": "auto"} for key, values in fixed.items() if getattr(train, key) in values]
        if train.tokens_per_microbatch > rollout.context_length:
            steps.append({"train.tokens_per_microbatch": rollout.context_length})
    steps += engines.of(recipe).memory.smaller(recipe)
    steps += [{"rollout.max_running_requests": n} for n in (16, 8, 4) if n < rollout.running]
    return accumulate(steps, or_)
