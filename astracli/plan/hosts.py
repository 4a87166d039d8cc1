"""What a plan over several hosts says of them: who runs where and by which rule, what a host lacks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from astracli.backends.choice import BackendChoice, choose
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.contract import Case
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import words
from astracli.models.adapter import ModelAdapter
from astracli.plan.cost import TrainerLoad
from astracli.plan.memory import total
from astracli.plan.offload import Reason
from astracli.plan.types import LaunchPlan, ProcessPlan
from astracli.process.config import Role
from astracli.process.layout import Split

TOO_SMALL = "give it fewer processes (`resources.engines`, `resources.rollout_gpus`), or name a larger host"
MOSTLY = 0.5
"""Of a step."""
SAME_SIZE = 0.98
"""GPUs of one name differ by so much in what they say of their memory."""
OF_ENGINES = ("engine", "serving_attention", "linear_attention")
"""What a host with engines alone must choose as the first does."""


def reasons(recipe: Recipe, processes: Sequence[ProcessPlan]) -> list[Reason]:
    """Where processes of other hosts run, and by which rule; nothing on one host."""
    homes = list(dict.fromkeys(process.host for process in processes if process.host is not None))
    found = []
    for home in homes:
        there = [process for process in processes if process.host == home]
        rules = []
        if any(process.role is Role.TRAINER for process in there):
            rules.append(
                f"the trainer's processes are on the first {recipe.resources.train_hosts} hosts, as many on each"
            )
        if any(process.role is Role.ENGINE for process in there):
            rules.append(
                "engines in equal blocks over the hosts beside the trainer's, a rollout worker with those of its host"
            )
        gpus = [gpu for process in there for gpu in process.gpus]
        on = f", on {len({*gpus})} GPUs" if gpus else ""
        found.append(Reason(f"host {home}", ", ".join(process.name for process in there) + on, "; ".join(rules)))
    first = [process for process in processes if process.host is None and process.role is Role.ENGINE]
    if homes and first and not recipe.resources.share_gpus:
        names = ", ".join(process.name for process in first)
        found.insert(0, Reason("the first host", names, "the other hosts have no GPU for these engines"))
    return found


def shortage(plan: LaunchPlan, host: str, facts: Machine) -> str | None:
    """What a host lacks for its processes, whatever the load; None when they fit."""
    need, size = total(plan.memory, where="host", fixed=True, host=host), facts.system.memory_total
    return f"host `{host}` needs at least {words(need)} of memory, it has {words(size)}" if need > size else None


def shortages(plan: LaunchPlan, fleet: Mapping[str, Machine]) -> list[PlanProblem]:
    """The same of each host whose facts are known."""
    found = [words for host, facts in fleet.items() if (words := shortage(plan, host, facts)) is not None]
    return [PlanProblem("memory", words, words, TOO_SMALL) for words in found]


def problems(recipe: Recipe, processes: Sequence[ProcessPlan]) -> list[PlanProblem]:
    """Hosts for which the recipe has no work."""
    agents, busy = recipe.agents, {process.host for process in processes}
    idle = [host for host in agents if host not in busy]
    if not idle:
        return []
    on_gpus = recipe.device == "cuda"
    key = "resources.rollout_gpus" if on_gpus else "resources.engines"
    have = recipe.resources.rollout_gpus if on_gpus else recipe.resources.engines
    message = (
        f"launch.hosts names {len(agents)} hosts beside the first, {key} = {have} leaves "
        f"{len(idle)} of them without an engine"
    )
    hint = f"`--set {key}={have + len(idle)}`, or name fewer hosts"
    return [PlanProblem("system", f"an engine for each of {len(agents)} hosts", message, hint)]


def software_problems(recipe: Recipe, choice: BackendChoice, fleet: Mapping[str, Machine]) -> list[PlanProblem]:
    """Packages that hosts lack for what they run."""
    found = []
    for host, machine in fleet.items():
        lacking = list(engines.of(recipe).problems(Case(machine, choice.device, recipe)))
        if choice.device == "cuda" and machine.torch_cuda is None:
            hint = "install a CUDA build of torch there: `pip install -c constraints/cuda.txt 'astracli[gpu]'`"
            lacking.append(PlanProblem("package", "a CUDA build of torch", "torch is built without CUDA", hint))
        found += [
            PlanProblem(
                each.kind, f"{each.what} on host {host}", f"host `{host}`: {each.message}", each.hint, each.blocking
            )
            for each in lacking
        ]
    return found


def unlike(
    recipe: Recipe,
    adapter: ModelAdapter,
    choice: BackendChoice,
    config: Mapping[str, Any] | None,
    fleet: Mapping[str, Machine],
    processes: Sequence[ProcessPlan],
) -> list[PlanProblem]:
    """Hosts on which kernels or the engine would be other ones than on the first: every process of a run is told of one
    choice."""
    found = []
    ranked = {process.host for process in processes if process.role is Role.TRAINER}
    for host, machine in fleet.items():
        try:
            own = choose(adapter, machine, recipe, config)
        except UserError as error:
            found.append(
                PlanProblem("gpus", f"another host than {host}", f"host `{host}`: {error.message}", error.hint)
            )
            continue
        names = choice.settings() if host in ranked else OF_ENGINES
        ours, theirs = choice.settings(), own.settings()
        other = [f"{name} {theirs[name]}, not {ours[name]}" for name in names if theirs[name] != ours[name]]
        if other:
            message = f"host `{host}` would run with {', '.join(other)} as the first host does"
            hint = "name hosts with GPUs and packages of one kind, or set that choice in the recipe"
            found.append(PlanProblem("gpus", f"a host like the first for {host}", message, hint))
    return found


def slow_ranks(load: TrainerLoad, split: Split) -> list[str]:
    """When ranks on several hosts spend most of a step on what they exchange."""
    peers, spent = load.pace.peers, load.communication_seconds(split) / load.step_seconds(split)
    if peers.link != "network" or spent < MOSTLY:
        return []
    return [
        f"the trainer's ranks spend {spent:.0%} of a step on {peers.words} (estimated): the GPUs of one host alone "
        "(resources.train_hosts = 1) may be as quick; a faster network, or a larger train.batch_groups, helps"
    ]


def refusal_of_newcomer(plan: LaunchPlan, machine: Machine) -> str | None:
    """Why a host that would join a run can serve none of its engines; None when it can. An engine there reserves the
    same part of its GPU as the others."""
    if not machine.visible_gpus:
        return "it has no GPU, and the engines of this run need one"
    if machine.torch_cuda is None:
        return "torch there is built without CUDA"
    known = [plan.gpu_sizes.get(gpu) for each in plan.processes if each.role is Role.ENGINE for gpu in each.gpu_ids]
    least = min(filter(None, known), default=0)
    small = [gpu for gpu in machine.visible_gpus if (gpu.memory_total or 0) < SAME_SIZE * least]
    if small:
        has = words(small[0].memory_total or 0)
        return f"GPU {small[0].index} there has {has}, the engines of this run have {words(least)} or more"
    return None


def joining(plan: LaunchPlan, host: str, machine: Machine | None, engines: int, workers: int) -> list[ProcessPlan]:
    """The processes of a host that joins: an engine on each of its GPUs, or one on its CPU, and a rollout worker.
    `engines`, `workers`: how many of each have a name already."""
    first = {role: next(each for each in plan.processes if each.role is role) for role in (Role.ENGINE, Role.ROLLOUT)}
    places: list[tuple[int, ...]] = [()]
    if plan.choice.device == "cuda" and machine is not None:
        places = [(gpu.index,) for gpu in machine.visible_gpus]
    made = []
    for n, gpus in enumerate(places):
        env = {**first[Role.ENGINE].env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        name = f"{Role.ENGINE.value}{engines + n}"
        made.append(replace(first[Role.ENGINE], name=name, host=host, gpus=gpus, env=env, restarts=0))
    worker = replace(first[Role.ROLLOUT], name=f"{Role.ROLLOUT.value}{workers or ''}", host=host, restarts=0)
    return [*made, worker]
