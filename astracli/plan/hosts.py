"""Which host of a run gets which engines. Pure.

The trainer, the evaluation worker and the supervisor are on the first host. Engines are divided over the other hosts in
blocks, each block with a rollout worker beside it: prompts, tokens and staged weights then stay on one host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from astracli.config.recipe import Recipe
from astracli.machine.facts import Machine
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import words
from astracli.plan.memory import total
from astracli.plan.offload import Reason
from astracli.plan.types import LaunchPlan, ProcessPlan

TOO_SMALL = "give it fewer engines (`resources.engines`), or name a larger host"


def spread(engines: int, agents: Sequence[str]) -> list[str | None]:
    """The host of each engine: None (the first) without agents, else blocks whose sizes differ by one at most."""
    if not agents:
        return [None] * engines
    share, more = divmod(engines, len(agents))
    return [host for n, host in enumerate(agents) for _ in range(share + (n < more))]


def reasons(processes: Sequence[ProcessPlan]) -> list[Reason]:
    """Where processes of other hosts run, and by which rule; nothing on one host."""
    rule = "engines in equal blocks over the hosts beside the first, a rollout worker with those of its host"
    homes = list(dict.fromkeys(process.host for process in processes if process.host is not None))
    names = {home: ", ".join(process.name for process in processes if process.host == home) for home in homes}
    return [Reason(f"host {home}", names[home], rule) for home in homes]


def shortage(plan: LaunchPlan, host: str, facts: Machine) -> str | None:
    """What a host lacks for its processes, whatever the load; None when they fit."""
    need, size = total(plan.memory, where="host", fixed=True, host=host), facts.system.memory_total
    return f"host `{host}` needs at least {words(need)} of memory, it has {words(size)}" if need > size else None


def shortages(plan: LaunchPlan, fleet: Mapping[str, Machine]) -> list[PlanProblem]:
    """The same of each host whose facts are known."""
    found = [words for host, facts in fleet.items() if (words := shortage(plan, host, facts)) is not None]
    return [PlanProblem("memory", words, words, TOO_SMALL) for words in found]


def problems(recipe: Recipe, engines: int, cuda: bool) -> list[PlanProblem]:
    """Hosts for which the recipe has no work, and what runs on one host alone."""
    agents = recipe.agents
    if not agents:
        return []
    if cuda:
        message = "launch.hosts is for runs on CPUs as yet, and this one uses GPUs"
        return [PlanProblem("gpus", "one host", message, "leave launch.hosts out, or `--set resources.device=cpu`")]
    if engines < len(agents):
        message = (
            f"launch.hosts names {len(agents)} hosts beside the first, resources.engines = {engines} leaves "
            f"{len(agents) - engines} of them without an engine"
        )
        hint = f"`--set resources.engines={len(agents)}`, or name fewer hosts"
        return [PlanProblem("system", f"an engine for each of {len(agents)} hosts", message, hint)]
    return []
