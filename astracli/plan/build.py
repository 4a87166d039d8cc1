"""The launch plan: which processes a command starts on this machine, what they need, and what is missing. Pure.

`build` never refuses: a plan for another machine can be looked at anywhere. `refuse` raises for what stops it here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.errors import UserError
from astracli.machine.component import Component
from astracli.machine.facts import Machine
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import MemoryRow
from astracli.models.adapter import MemoryShape, ModelAdapter
from astracli.plan import hints, margin, problems, staging
from astracli.plan.cost import pace
from astracli.plan.memory import disk_rows, light_row, on_gpu, solid, total
from astracli.plan.placement import Gpus, Placement, place, time_shared
from astracli.plan.requests import settle
from astracli.plan.trainer import SPARE_BYTES, trainer_rows
from astracli.plan.types import Command, LaunchPlan, ProcessPlan
from astracli.process import layout
from astracli.process.config import Role

MODULES = {
    Role.ROLLOUT: "astracli.rollout.worker",
    Role.TRAINER: "astracli.training.worker",
    Role.EVAL: "astracli.evaluation.worker",
}
TRAINER_ON_GPU = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Environment of a trainer there: what moves between GPU and host, and rows of many lengths, leave no holes. Without it
a trainer whose tensors fill 75 of 78.6 GiB ran out of memory over 3.5 GiB of them (docs/benchmarks.md)."""


def build(
    recipe: Recipe,
    adapter: ModelAdapter,
    choice: BackendChoice,
    facts: Machine,
    *,
    command: Command = "train",
    config: Mapping[str, Any] | None = None,
    checkpoint_bytes: int | None = None,
) -> LaunchPlan:
    """The plan of one command. `config` is the checkpoint's config.json, None when it is not on this machine (then the
    sizes of a model that the adapter knows are used); `checkpoint_bytes` its size on disk."""
    known = config if config is not None else adapter.known_configs.get(recipe.model.path)
    shape = adapter.memory_shape(known) if known is not None else None

    def fits(other: Recipe, lightly: bool) -> bool:
        tried = _build(other, choice, facts, command, shape, None, lambda otherwise: otherwise)
        blocked = any(problem.blocking and problem.kind in ("gpus", "memory") for problem in tried.problems)
        strained = tried.placement.short or any(each.short for each in tried.margins)
        return not blocked and not (lightly and strained)

    def way_out(otherwise: str) -> str:
        count = len(facts.visible_gpus)
        sets = hints.find(recipe, command, count, fits) if count and choice.device == "cuda" else None
        return f"run {hints.command_line(command, recipe.name, sets)}" if sets else otherwise

    plan = _build(recipe, choice, facts, command, shape, checkpoint_bytes, way_out)
    if config is not None:
        return plan
    what = f"checkpoint {recipe.model.path} not on this machine"
    absent = PlanProblem("checkpoint", what, what, "it is downloaded when a run starts", blocking=False)
    return replace(plan, problems=(*plan.problems, absent))


def _build(
    recipe: Recipe,
    choice: BackendChoice,
    facts: Machine,
    command: Command,
    shape: MemoryShape | None,
    checkpoint_bytes: int | None,
    way_out: Callable[[str], str],
) -> LaunchPlan:
    """`way_out(otherwise)`: the hint of a problem of size."""
    processes = _processes(recipe, choice, facts, command)
    asked = recipe
    recipe, placement = _place(processes, shape, asked, choice, facts)
    memory = _memory(processes, shape, recipe, choice.device, placement, facts)
    if (host := _room_on_host(processes, memory, facts)) is not None and choice.device == "cuda":
        recipe, placement = _place(processes, shape, asked, choice, facts, host)
        memory = _memory(processes, shape, recipe, choice.device, placement, facts)
    if roomy := _room_to_publish(processes, memory, facts, placement.time_sharing):
        memory = _memory(processes, shape, recipe, choice.device, placement, facts, roomy)
    if shape and command == "train":
        placement, memory = staging.decide(processes, memory, shape, recipe, placement, facts)
    if placement.time_sharing:
        # a worker that starts again does not know who has the GPU
        processes = [replace(process, restarts=0) for process in processes]
    disk = disk_rows(shape, recipe, checkpoint_bytes) if shape and command == "train" else []
    plan = LaunchPlan(
        recipe=recipe.name,
        command=command,
        choice=choice,
        processes=tuple(processes),
        placement=placement,
        memory=tuple(memory),
        disk=tuple(disk),
        model=_model(shape, recipe) if shape else {},
        gpu_sizes=facts.gpu_sizes,
        host_size=facts.system.memory_total,
        running_requests=recipe.rollout.running,
        expected=recipe.expected.model_dump(exclude_none=True) if recipe.expected else {},
    )
    if choice.device == "cuda":
        plan = replace(plan, margins=margin.margins(plan.memory, plan.gpu_map, plan.gpu_sizes))
    found = [
        *problems.gpu_problems(plan, recipe, facts, way_out),
        *problems.software_problems(recipe, choice, facts),
        *problems.size_problems(plan, recipe, shape, facts, way_out),
    ]
    warnings = [*choice.warnings, *problems.warnings(plan, recipe, facts), *margin.warnings(plan.margins)]
    return replace(plan, problems=tuple(found), warnings=tuple(warnings))


def refuse(plan: LaunchPlan) -> None:
    """Raise UserError (exit 2) with the first thing that stops the plan on this machine; return when nothing does."""
    blocking = [problem for problem in plan.problems if problem.blocking]
    if blocking:
        first, *others = blocking
        also = f" (also missing: {', '.join(problem.what for problem in others)})" if others else ""
        raise UserError(first.message + also, first.hint)


def _processes(recipe: Recipe, choice: BackendChoice, facts: Machine, command: Command) -> list[ProcessPlan]:
    resources, threads, start = recipe.resources, recipe.resources.threads, engines.of(recipe).start(recipe)
    cuda = choice.device == "cuda"
    restarts = recipe.launch.max_restarts if recipe.launch.max_restarts is not None else (2 if cuda else 0)
    if recipe.launch.deterministic:
        restarts = 0  # a wave whose engine dies begins again, whole, and that is what a resume does
    physical = [gpu.index for gpu in facts.visible_gpus]
    engine_gpus, train_gpus = _placement(recipe, physical) if cuda else ([], [])

    def child(name: str, role: Role, gpus: list[int], **more: Any) -> ProcessPlan:
        count = {Role.ENGINE: threads.engine, Role.TRAINER: threads.trainer}.get(role, threads.other)
        env = {
            **choice.env,
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
            "OMP_NUM_THREADS": str(count),
            "TOKENIZERS_PARALLELISM": "false",
            **(start.env if role is Role.ENGINE else {}),
            **(TRAINER_ON_GPU if role is Role.TRAINER and cuda else {}),
        }
        return ProcessPlan(
            name=name,
            role=role,
            module=start.module if role is Role.ENGINE else MODULES[role],
            gpus=tuple(gpus),
            threads=count,
            nice=0 if role in (Role.ENGINE, Role.TRAINER) else 5,
            restarts=0 if role is Role.TRAINER else restarts,
            env=env,
            **more,
        )

    result = []
    for index in range(len(engine_gpus) if cuda else resources.engines):
        own = engine_gpus[index : index + 1]
        result.append(child(f"engine{index}", Role.ENGINE, own, python=start.python))
    if command in ("train", "rollout"):
        result.append(child("rollout", Role.ROLLOUT, [], children=recipe.data.reward_workers))
    ranks = (len(train_gpus) if cuda else resources.train_ranks) if command == "train" else 0
    for rank in range(ranks):
        own = train_gpus[rank : rank + 1]
        result.append(child(f"trainer{rank or ''}", Role.TRAINER, own, rank=rank, world_size=ranks))
    if command == "eval" or (command == "train" and recipe.eval.benchmarks and recipe.eval.every):
        result.append(child("eval", Role.EVAL, [], children=recipe.data.reward_workers))
    return result


def _placement(recipe: Recipe, physical: list[int]) -> tuple[list[int], list[int]]:
    """(engine GPUs, trainer GPUs): rollout first, then training; from 0 again when they share. Where this machine has
    fewer, indexes go on counting: the plan is then for another machine."""
    rollout, train = recipe.resources.rollout_gpus, recipe.resources.train_gpus
    start = 0 if recipe.resources.share_gpus else rollout
    beyond = range(max(physical, default=-1) + 1, max(physical, default=-1) + 1 + rollout + train)
    slots = [*physical, *beyond]
    return slots[:rollout], slots[start : start + train]


def _place(
    processes: list[ProcessPlan],
    shape: MemoryShape | None,
    recipe: Recipe,
    choice: BackendChoice,
    facts: Machine,
    host: int | None = None,
) -> tuple[Recipe, Placement]:
    """The recipe with what it leaves to the machine, and where things lie. `host`: bytes that trainers may take there,
    None while there is enough."""
    if choice.device != "cuda":
        return settle(recipe, shape, Gpus())[0], Placement()
    engine, trainer = _of(processes, Role.ENGINE), _of(processes, Role.TRAINER)
    slowest = pace([gpu for gpu in facts.visible_gpus if gpu.index in trainer])
    gpus = Gpus(facts.gpu_sizes, engine, trainer, slowest)
    recipe, why = settle(recipe, shape, gpus)
    placement = place(recipe, shape, gpus, host)
    if why is not None:
        row = ("requests", f"{recipe.rollout.running} at once", why)
        placement = replace(placement, reasons=(row, *placement.reasons))
    return recipe, placement


def _memory(
    processes: list[ProcessPlan],
    shape: MemoryShape | None,
    recipe: Recipe,
    device: str,
    placement: Placement,
    facts: Machine,
    published_on_gpu: Collection[str] = (),
) -> list[MemoryRow]:
    """`published_on_gpu`: trainers whose published versions lie on their GPU, those of others on the host."""
    rows, sizes = [light_row("supervisor")], facts.gpu_sizes if device == "cuda" else {}
    for process in processes:
        if process.role is Role.ENGINE and shape:
            gpu_bytes = next((sizes[gpu] for gpu in process.gpus if gpu in sizes), None)
            static = None if gpu_bytes is None else int((placement.mem_fraction_static or 0.0) * gpu_bytes)
            rows += engines.of(recipe).memory.rows(process.name, shape, recipe, device, reserved=static)
        elif process.role is Role.TRAINER and shape:
            published: layout.Where = "gpu" if process.name in published_on_gpu else "host"
            rows += trainer_rows(process.name, shape, recipe, device, process.world_size, placement.split, published)
        else:
            rows.append(light_row(process.name, process.children))
    if not placement.time_sharing:
        return rows
    return time_shared(rows, _on_shared_gpus(processes))


def _on_shared_gpus(processes: Sequence[ProcessPlan]) -> set[str]:
    """Processes on a GPU that an engine and a trainer use."""
    shared = set(_of(processes, Role.ENGINE)) & set(_of(processes, Role.TRAINER))
    return {p.name for p in processes if set(p.gpus) & shared}


def _of(processes: Sequence[ProcessPlan], role: Role) -> list[int]:
    """The GPUs of a role's processes."""
    return [gpu for process in processes if process.role is role for gpu in process.gpus]


def _room_on_host(processes: Sequence[ProcessPlan], rows: Sequence[MemoryRow], facts: Machine) -> int | None:
    """What others leave trainers of a host that is too small for all of them; None where all fit."""
    size = facts.system.memory_total
    if total(rows, where="host", fixed=True) <= size:
        return None
    others = [process.name for process in processes if process.role is not Role.TRAINER] + ["supervisor"]
    return int(size - total(rows, where="host", fixed=True, processes=others))


def _room_to_publish(
    processes: Sequence[ProcessPlan], rows: Sequence[MemoryRow], facts: Machine, time_sharing: bool
) -> set[str]:
    """Trainers whose GPU has room for two published versions beside all else; each rank finds out for itself
    (`weights.snapshot`). One that leaves its GPU to the engine keeps them on the host."""
    sizes = facts.gpu_sizes
    held = {row.process: row.bytes for row in rows if row.component is Component.PUBLISHED}
    leaves = _on_shared_gpus(processes) if time_sharing else set()

    def fits(gpu: int, trainer: str) -> bool:
        names = [p.name for p in processes if gpu in p.gpus]
        need = on_gpu(solid(rows), names) + held[trainer] + SPARE_BYTES
        return gpu in sizes and need <= sizes[gpu]

    there = [p for p in processes if p.name in held and p.gpus and p.name not in leaves]
    return {p.name for p in there if all(fits(gpu, p.name) for gpu in p.gpus)}


def _model(shape: MemoryShape, recipe: Recipe) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "state_bytes_per_sequence": shape.state_bytes_per_sequence,
        "flops_per_trained_token": shape.flops_per_token,
        "sequences_per_step": recipe.batch_sequences,
    }
