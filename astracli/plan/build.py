"""The launch plan: which processes a command starts on this machine, what they need, and what is missing. Pure.

`build` never refuses: a plan for another machine can be looked at anywhere. `refuse` raises for what stops it here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import Component, MemoryRow
from astracli.models import lora_targets
from astracli.models.adapter import MemoryShape, ModelAdapter
from astracli.plan import gpus as places
from astracli.plan import hints, hosts, problems, prompts, staging
from astracli.plan.cost import TrainerLoad, pace
from astracli.plan.memory import disk_rows, light_row, on_gpu, solid, total
from astracli.plan.offload import Reason
from astracli.plan.placement import Gpus, Placement, place, place_on_cpu, time_shared
from astracli.plan.requests import settle
from astracli.plan.trainer import SPARE_BYTES, trainer_rows
from astracli.plan.types import TRAINING, Command, LaunchPlan, ProcessPlan
from astracli.process import layout
from astracli.process.config import Role

MODULES = {
    Role.ROLLOUT: "astracli.rollout.worker",
    Role.TRAINER: "astracli.training.worker",
    Role.EVAL: "astracli.evaluation.worker",
}
TRAINER_ON_GPU = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Environment of a trainer on a GPU: tensors that move to and from the host, and rows of many lengths, then leave no
holes in memory. Without it, a trainer whose tensors filled 75 of 78.6 GiB ran out of memory (docs/benchmarks.md)."""


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
    shape = _shape(adapter, recipe, known) if known is not None else None
    if shape is not None and known is not None:
        shape = replace(lora_targets.sized(shape, recipe.lora, adapter, known), teacher=teacher)
    draft = _Draft(recipe, choice, facts, command, shape, checkpoint_bytes, fleet)

    def fit(other: Recipe) -> hints.Fit:
        tried = replace(draft, asked=other).plan(lambda otherwise: otherwise)
        if any(problem.blocking and problem.kind in ("gpus", "memory") for problem in tried.problems):
            return hints.Fit.NOT
        strained = tried.placement.short or any(each.short for each in tried.margins)
        return hints.Fit.TIGHTLY if strained else hints.Fit.WELL

    @cache  # several things may be too small
    def settings() -> hints.Sets | None:
        count = len(facts.visible_gpus)
        return hints.find(recipe, command, count, fit) if count and draft.cuda else None

    def way_out(otherwise: str) -> str:
        sets = settings()
        return f"run {hints.command_line(command, recipe.name, sets)}" if sets else otherwise

    plan = replace(draft.plan(way_out), prompts=prompts.words(recipe, chat_template))
    if config is not None:
        odd = problems.checkpoint_problems(recipe, choice, facts, adapter, config)
        return replace(plan, problems=(*odd, *plan.problems))
    what = f"checkpoint {recipe.model.path} not on this machine"
    absent = PlanProblem("checkpoint", what, what, "it is downloaded when a run starts", blocking=False)
    return replace(plan, problems=(*plan.problems, absent))


def _shape(adapter: ModelAdapter, recipe: Recipe, config: Mapping[str, Any]) -> MemoryShape:
    """What the adapter makes of a config.json. Raises UserError for one that lacks what the family has."""
    try:
        return adapter.memory_shape(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        said = f"{type(error).__name__}: {error}"[:200]
        raise UserError(
            f"the config.json of `{recipe.model.path}` is none that adapter `{adapter.name}` reads: {said}",
            "download the checkpoint again, or name another with `--set model.adapter=NAME`",
        ) from None


def refuse(plan: LaunchPlan) -> None:
    """Raise UserError (exit 2) with the first thing that stops the plan on this machine; return when nothing does."""
    blocking = [problem for problem in plan.problems if problem.blocking]
    if blocking:
        first, *others = blocking
        also = f" (also missing: {', '.join(problem.what for problem in others)})" if others else ""
        raise UserError(first.message + also, first.hint)


@dataclass(frozen=True)
class _Draft:
    """A plan in the making: what every part of it is computed from."""

    asked: Recipe
    """As it was given; `recipe` has what it leaves to the machine."""
    choice: BackendChoice
    facts: Machine
    command: Command
    shape: MemoryShape | None
    checkpoint_bytes: int | None
    fleet: Mapping[str, Machine]

    def plan(self, way_out: Callable[[str], str]) -> LaunchPlan:
        """`way_out(otherwise)`: the hint of a problem of size."""
        recipe, shape, facts, processes = self.recipe, self.shape, self.facts, self.processes
        placement = self.placement()
        memory = self.memory(placement)
        if self.cuda and (host := self.room_on_host(memory)) is not None:
            placement = self.placement(host)
            memory = self.memory(placement)
        if roomy := self.room_to_publish(memory, placement.time_sharing):
            memory = self.memory(placement, roomy)
        if shape and self.trains:
            placement, memory = staging.decide(processes, memory, shape, recipe, placement, facts)
        if placement.time_sharing:
            # a worker that starts again does not know who has the GPU
            processes = [replace(process, restarts=0) for process in processes]
        disk = disk_rows(shape, recipe, self.checkpoint_bytes) if shape and self.trains else []
        placement = replace(placement, reasons=(*placement.reasons, *hosts.reasons(processes)))
        plan = LaunchPlan(
            recipe=recipe.name,
            command=self.command,
            choice=self.choice,
            processes=tuple(processes),
            placement=placement,
            memory=tuple(memory),
            disk=tuple(disk),
            model=_model(shape, recipe) if shape else {},
            gpu_sizes=facts.gpu_sizes,
            gpu_share=facts.gpu_share,
            host_size=facts.system.memory_total,
            running_requests=recipe.rollout.running,
            expected=recipe.expected.model_dump(exclude_none=True) if recipe.expected else {},
        )
        if self.cuda:
            plan = replace(plan, margins=places.margins(plan.memory, plan.gpu_map, plan.gpu_sizes))
        engine_count = sum(process.role is Role.ENGINE for process in processes)
        found = [
            *(hosts.problems(recipe, engine_count, self.cuda) if self.command == "train" else ()),
            *hosts.shortages(plan, self.fleet),
            *problems.gpu_problems(plan, recipe, facts, way_out),
            *problems.software_problems(recipe, self.choice, facts),
            *problems.size_problems(plan, recipe, shape, facts, way_out),
        ]
        warnings = [*self.choice.warnings, *problems.warnings(plan, recipe, facts), *places.warnings(plan.margins)]
        return replace(plan, problems=tuple(found), warnings=tuple(warnings))

    @property
    def cuda(self) -> bool:
        return self.choice.device == "cuda"

    @property
    def trains(self) -> bool:
        return self.command in TRAINING

    @property
    def serves(self) -> bool:
        """Whether there are engines: always, but in supervised training only for evaluations."""
        return self.command != "sft" or self.asked.evaluation_due(self.asked.train.steps)

    @cached_property
    def gpus(self) -> Gpus:
        """Rollout first, then training; from the first GPU again when they share. Where this machine has fewer, indexes
        go on counting: the plan is then for another machine."""
        if not self.cuda:
            return Gpus()
        rollout, train = self.asked.resources.rollout_gpus, self.asked.resources.train_gpus
        visible = self.facts.visible_gpus
        beyond = max((gpu.index for gpu in visible), default=-1) + 1
        slots = [*(gpu.index for gpu in visible), *range(beyond, beyond + rollout + train)]
        start = 0 if self.asked.resources.share_gpus or not self.serves else rollout
        trainer = slots[start : start + train] if self.trains else []
        slowest = pace([gpu for gpu in visible if gpu.index in trainer], self.facts.peer_link)
        return Gpus(self.facts.gpu_sizes, slots[:rollout] if self.serves else [], trainer, slowest)

    @cached_property
    def _settled(self) -> tuple[Recipe, str | None]:
        return settle(self.asked, self.shape, self.gpus)

    @property
    def recipe(self) -> Recipe:
        """With what it leaves to the machine."""
        return self._settled[0]

    @cached_property
    def processes(self) -> list[ProcessPlan]:
        recipe, gpus, train = self.asked, self.gpus, self.trains
        resources, workers = recipe.resources, recipe.data.reward_workers * max(1, len(recipe.data.rewards))
        engine_count = len(gpus.engine) if self.cuda else resources.engines if self.serves else 0
        homes = hosts.spread(engine_count, recipe.launch.agents if self.command == "train" else ())
        result = [
            self._process(f"engine{i}", Role.ENGINE, gpus.engine[i : i + 1], host=home) for i, home in enumerate(homes)
        ]
        if self.command == "sft" and self.serves:  # no prompts: it brings versions into the engines
            result.append(self._process("rollout", Role.ROLLOUT))
        elif self.command in ("train", "rollout"):
            for n, home in enumerate(dict.fromkeys(homes or [None])):  # one worker a host, for the engines there
                result.append(self._process(f"rollout{n or ''}", Role.ROLLOUT, children=workers, host=home))
        ranks = (len(gpus.trainer) if self.cuda else resources.train_ranks) if train else 0
        for rank in range(ranks):
            own, name = gpus.trainer[rank : rank + 1], f"trainer{rank or ''}"
            result.append(self._process(name, Role.TRAINER, own, rank=rank, world_size=ranks))
        if self.command == "eval" or (train and recipe.eval.benchmarks and recipe.eval.every):
            result.append(self._process("eval", Role.EVAL, children=workers))
        return result

    def _process(self, name: str, role: Role, gpus: Sequence[int] = (), **more: Any) -> ProcessPlan:
        launch, threads, engine = self.asked.launch, self.asked.resources.threads, role is Role.ENGINE
        start = engines.of(self.asked).start(self.asked)
        count = {Role.ENGINE: threads.engine, Role.TRAINER: threads.trainer}.get(role, threads.other)
        restarts = launch.max_restarts if launch.max_restarts is not None else (2 if self.cuda else 0)
        if launch.deterministic or role is Role.TRAINER:
            restarts = 0  # a wave whose engine dies begins again, whole, and that is what a resume does
        env = {
            **self.choice.env,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "OMP_NUM_THREADS": str(count),
            "TOKENIZERS_PARALLELISM": "false",
            **(start.env if engine else {}),
            **(TRAINER_ON_GPU if role is Role.TRAINER and self.cuda else {}),
        }
        return ProcessPlan(
            name=name,
            role=role,
            module=start.module if engine else MODULES[role],
            python=start.python if engine else None,
            gpus=tuple(gpus),
            threads=count,
            nice=0 if role in (Role.ENGINE, Role.TRAINER) else 5,
            restarts=restarts,
            env=env,
            **more,
        )

    def placement(self, host: int | None = None) -> Placement:
        """`host`: bytes that trainers may use there, None while there is enough."""
        if not self.cuda:
            ranks = self.recipe.resources.train_ranks if self.trains else 1
            return place_on_cpu(self.recipe, ranks)
        placed, (recipe, why) = place(self.recipe, self.shape, self.gpus, host), self._settled
        if why is None:
            return placed
        requests = Reason("requests", f"{recipe.rollout.running} at once", why)
        return replace(placed, reasons=(requests, *placed.reasons))

    def memory(self, placement: Placement, published_on_gpu: Collection[str] = ()) -> list[MemoryRow]:
        """`published_on_gpu`: trainers whose published versions lie on their GPU, those of others on the host."""
        rows, recipe, shape, device = [light_row("supervisor")], self.recipe, self.shape, self.choice.device
        for process in self.processes:
            if process.role is Role.ENGINE and shape:
                size = self.gpus.smallest(process.gpus)
                static = None if size is None else int((placement.mem_fraction_static or 0.0) * size)
                rows += engines.of(recipe).memory.rows(process.name, shape, recipe, device, reserved=static)
            elif process.role is Role.TRAINER and shape:
                published: layout.Where = "gpu" if process.name in published_on_gpu else "host"
                load = TrainerLoad(recipe, shape, process.world_size)
                rows += trainer_rows(process.name, load, device, placement.split, published)
            else:
                rows.append(light_row(process.name, process.children))
        rows = time_shared(rows, self.on_shared_gpus) if placement.time_sharing else rows
        homes = {process.name: process.host for process in self.processes}
        return [replace(row, host=home) if (home := homes.get(row.process)) else row for row in rows]

    @property
    def on_shared_gpus(self) -> set[str]:
        """Processes on a GPU that an engine and a trainer use."""
        shared = set(self.gpus.engine) & set(self.gpus.trainer)
        return {process.name for process in self.processes if shared & set(process.gpus)}

    def room_on_host(self, rows: Sequence[MemoryRow]) -> int | None:
        """What others leave trainers of a host that is too small for all of them; None where all fit."""
        size = self.facts.system.memory_total
        if total(rows, where="host", fixed=True) <= size:
            return None
        others = [process.name for process in self.processes if process.role is not Role.TRAINER]
        return int(size - total(rows, where="host", fixed=True, processes=[*others, "supervisor"]))

    def room_to_publish(self, rows: Sequence[MemoryRow], time_sharing: bool) -> set[str]:
        """Trainers whose GPU has room for two published versions beside all else; each rank finds out for itself
        (`weights.snapshot`). One that leaves its GPU to the engine keeps them on the host."""
        sizes, leaves = self.facts.gpu_sizes, self.on_shared_gpus if time_sharing else set()
        held = {row.process: row.bytes for row in rows if row.component is Component.PUBLISHED}

        def fits(gpu: int, trainer: str) -> bool:
            names = [process.name for process in self.processes if gpu in process.gpus]
            need = on_gpu(solid(rows), names) + held[trainer] + SPARE_BYTES
            return gpu in sizes and need <= sizes[gpu]

        there = [p for p in self.processes if p.name in held and p.gpus and p.name not in leaves]
        return {p.name for p in there if all(fits(gpu, p.name) for gpu in p.gpus)}


def _model(shape: MemoryShape, recipe: Recipe) -> dict[str, Any]:
    adapters = {"adapter_parameters": shape.adapters} if shape.adapters else {}
    return {
        "parameters": shape.parameters,
        **adapters,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "state_bytes_per_sequence": shape.state_bytes_per_sequence,
        "flops_per_trained_token": shape.flops_per_token,
        "sequences_per_step": recipe.batch_sequences,
    }
