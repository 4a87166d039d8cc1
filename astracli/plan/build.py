"""The launch plan: which processes a command starts on this machine, what they need, and what is missing. Pure.

`build` never refuses: a plan for another machine can be looked at anywhere. `refuse` raises for what stops it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.machine.findings import PlanProblem
from astracli.models import lora_targets
from astracli.models.adapter import ModelAdapter
from astracli.plan import hints, hosts, problems, prompts
from astracli.plan.draft import Draft
from astracli.plan.types import Command, LaunchPlan


def build(
    recipe: Recipe,
    adapter: ModelAdapter,
    choice: BackendChoice,
    facts: Machine,
    *,
    command: Command = "train",
    config: Mapping[str, Any] | None = None,
    checkpoint_bytes: int | None = None,
    chat_template: str | None = None,
    teacher: int = 0,
    fleet: Mapping[str, Machine] = MappingProxyType({}),
) -> LaunchPlan:
    """The plan of one command, on the host of `facts` and those of `fleet`, as far as these are known.

    `config`: the checkpoint's config.json; None when it is not on this machine, then the sizes of a model that the
    adapter knows are used. `checkpoint_bytes`: its size on disk. `chat_template`: its text, None when it is not known.
    `teacher`: parameters of the model that the algorithm asks for, 0 without one.
    """
    known = config if config is not None else adapter.known_configs.get(recipe.model.path)
    shape = adapter.asked(adapter.memory_shape, known, recipe.model.path) if known is not None else None
    if shape is not None and known is not None:
        shape = replace(lora_targets.sized(shape, recipe.lora, adapter, known), teacher=teacher)
    draft = Draft(recipe, choice, facts, command, shape, checkpoint_bytes, fleet)
    unlike = hosts.unlike(recipe, adapter, choice, config, fleet, draft.processes)

    def fit(other: Recipe) -> hints.Fit:
        tried = replace(draft, asked=other).plan(lambda otherwise: otherwise)
        if any(problem.blocking and problem.kind in ("gpus", "memory") for problem in tried.problems):
            return hints.Fit.NOT
        strained = tried.placement.short or any(each.short for each in tried.margins)
        return hints.Fit.TIGHTLY if strained else hints.Fit.WELL

    @cache  # several things may be too small
    def settings() -> hints.Sets | None:
        first, *others = (len(machine.visible_gpus) for machine in draft.machines.values() if machine is not None)
        return hints.find(recipe, command, first, fit, sum(others)) if first and draft.cuda else None

    def way_out(otherwise: str) -> str:
        sets = settings()
        return f"run {hints.command_line(command, recipe.name, sets)}" if sets else otherwise

    plan = replace(draft.plan(way_out), prompts=prompts.words(recipe, chat_template))
    plan = replace(plan, problems=(*plan.problems, *unlike))
    if config is not None:
        odd = problems.checkpoint_problems(recipe, choice, facts, adapter, config)
        return replace(plan, problems=(*odd, *plan.problems))
    what = f"checkpoint {recipe.model.path} not on this machine"
    absent = PlanProblem("checkpoint", what, what, "it is downloaded when a run starts", blocking=False)
    return replace(plan, problems=(*plan.problems, absent))


def refuse(plan: LaunchPlan) -> None:
    """Raise UserError (exit 2) with the first thing that stops the plan on this machine; return when nothing does."""
    blocking = [problem for problem in plan.problems if problem.blocking]
    if blocking:
        first, *others = blocking
        also = f" (also missing: {', '.join(problem.what for problem in others)})" if others else ""
        raise UserError(first.message + also, first.hint)
