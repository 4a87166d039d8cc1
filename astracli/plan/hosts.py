"""Which host of a run gets which engines. Pure.

The trainer, the evaluation worker and the supervisor are on the first host. Engines are divided over the other hosts in
blocks, each block with a rollout worker beside it: prompts, tokens and staged weights then stay on one host.
"""

from __future__ import annotations

from collections.abc import Sequence

from astracli.config.recipe import Recipe
from astracli.machine.findings import PlanProblem


def spread(engines: int, agents: Sequence[str]) -> list[str | None]:
    """The host of each engine: None (the first) without agents, else blocks whose sizes differ by one at most."""
    if not agents:
        return [None] * engines
    share, more = divmod(engines, len(agents))
    return [host for n, host in enumerate(agents) for _ in range(share + (n < more))]


def problems(recipe: Recipe, engines: int, cuda: bool) -> list[PlanProblem]:
    """Hosts for which the recipe has no work, and what runs on one host alone."""
    agents = recipe.launch.agents
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
