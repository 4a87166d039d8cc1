"""A plan in the making: processes, where each is, memory and what is missing, each from what comes before it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.machine.facts import Machine
from astracli.machine.memory import Component, MemoryRow
from astracli.models.adapter import MemoryShape
from astracli.plan import gpus as places
from astracli.plan import hosts, problems, staging
from astracli.plan.communication import over_network
from astracli.plan.cost import TrainerLoad, pace
from astracli.plan.memory import disk_rows, light_row, on_gpu, solid, total
from astracli.plan.offload import Reason
from astracli.plan.placement import Gpus, Placement, place, place_on_cpu, time_shared
from astracli.plan.requests import settle
from astracli.plan.seats import GpuId, Host, Seats, cpu_hosts, seat
from astracli.plan.trainer import SPARE_BYTES, trainer_rows
from astracli.plan.transfers import Transfers, transfers
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


@dataclass(frozen=True)
class Draft:
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
            sizes = {host: machine.system.memory_total for host, machine in self.machines.items() if machine}
            placement, memory = staging.decide(processes, memory, shape, recipe, placement, self.gpus.sizes, sizes)
        if placement.time_sharing:
            # a worker that starts again does not know who has the GPU
            processes = [replace(process, restarts=0) for process in processes]
        disk = disk_rows(shape, recipe, self.checkpoint_bytes) if shape and self.trains else []
        sent = self.transfers(placement)
        told = [*hosts.reasons(recipe, processes), *([sent.reason()] if sent else [])]
        placement = replace(placement, reasons=(*placement.reasons, *told))
        plan = LaunchPlan(
            recipe=recipe.name,
            command=self.command,
            choice=self.choice,
            processes=tuple(processes),
            placement=placement,
            memory=tuple(memory),
            disk=tuple(disk),
            model=_model(shape, recipe) if shape else {},
            gpu_sizes=self.gpus.sizes if self.cuda else {GpuId(i): size for i, size in facts.gpu_sizes.items()},
            gpu_share=min(machine.gpu_share for machine in self.machines.values() if machine is not None),
            host_size=facts.system.memory_total,
            host_sizes={host: machine.system.memory_total for host, machine in self.fleet.items()},
            running_requests=recipe.rollout.running,
            expected=recipe.expected.model_dump(exclude_none=True) if recipe.expected else {},
        )
        if self.cuda:
            plan = replace(plan, margins=places.margins(plan.memory, plan.gpu_map, plan.gpu_sizes))
        found = [
            *(hosts.problems(recipe, processes) if self.command == "train" else ()),
            *hosts.shortages(plan, self.fleet),
            *problems.gpu_problems(plan, recipe, self.machines, way_out),
            *problems.software_problems(recipe, self.choice, facts),
            *hosts.software_problems(recipe, self.choice, self.fleet),
            *problems.size_problems(plan, recipe, shape, facts, way_out),
        ]
        warnings = [*self.choice.warnings, *problems.warnings(plan, recipe, facts), *places.warnings(plan.margins)]
        warnings += sent.warnings() if sent else []
        warnings += hosts.slow_ranks(self.load, placement.split) if self.load is not None else []
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
    def machines(self) -> dict[Host, Machine | None]:
        """The hosts of this command in their order; None: not known yet."""
        others = self.asked.agents if self.command == "train" else ()
        return {None: self.facts, **{host: self.fleet.get(host) for host in others}}

    @cached_property
    def gpus(self) -> Gpus:
        if not self.cuda:
            return Gpus()
        asked, known = self.asked.resources, {host: machine for host, machine in self.machines.items() if machine}
        engines, ranks = asked.rollout_gpus if self.serves else 0, asked.train_gpus if self.trains else 0
        seats: Seats = seat(asked, self.machines, engines, ranks)
        sizes = {GpuId(i, host): size for host, machine in known.items() for i, size in machine.gpu_sizes.items()}
        own = set(seats.trainer)
        slow = [gpu for host, machine in known.items() for gpu in machine.visible_gpus if GpuId(gpu.index, host) in own]
        others = [host for host in dict.fromkeys(gpu.host for gpu in seats.trainer) if host is not None]
        links = [known[host].link if host in known else None for host in others]
        slowest = pace(slow, self.facts.peer_link, over_network(links) if others else None)
        return Gpus(sizes, seats.engines, seats.trainer, slowest)

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
        homes, ranked = cpu_hosts(resources, list(self.machines), resources.engines if self.serves else 0)
        if self.cuda:
            homes, ranked = [gpu.host for gpu in gpus.engine], [gpu.host for gpu in gpus.trainer]
        result = [
            self._process(f"engine{i}", Role.ENGINE, gpus.engine[i : i + 1], host=home) for i, home in enumerate(homes)
        ]
        if self.command == "sft" and self.serves:  # no prompts: it brings versions into the engines
            result.append(self._process("rollout", Role.ROLLOUT))
        elif self.command in ("train", "rollout"):
            for n, home in enumerate(dict.fromkeys(homes or [None])):  # one worker a host, for the engines there
                result.append(self._process(f"rollout{n or ''}", Role.ROLLOUT, children=workers, host=home))
        ranks = len(ranked) if train else 0
        for rank, home in enumerate(ranked[:ranks]):
            own, name = gpus.trainer[rank : rank + 1], f"trainer{rank or ''}"
            result.append(self._process(name, Role.TRAINER, own, host=home, rank=rank, world_size=ranks))
        if self.command == "eval" or (train and recipe.eval.benchmarks and recipe.eval.every):
            result.append(self._process("eval", Role.EVAL, children=workers))
        return result

    def _process(self, name: str, role: Role, gpus: Sequence[GpuId] = (), **more: Any) -> ProcessPlan:
        launch, threads, engine = self.asked.launch, self.asked.resources.threads, role is Role.ENGINE
        start = engines.of(self.asked).start(self.asked)
        count = {Role.ENGINE: threads.engine, Role.TRAINER: threads.trainer}.get(role, threads.other)
        restarts = launch.max_restarts if launch.max_restarts is not None else (2 if self.cuda else 0)
        if launch.deterministic or role is Role.TRAINER:
            restarts = 0  # a wave whose engine dies begins again, whole, and that is what a resume does
        env = {
            **self.choice.env,
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus),
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
            gpus=tuple(gpu.index for gpu in gpus),
            threads=count,
            nice=0 if role in (Role.ENGINE, Role.TRAINER) else 5,
            restarts=restarts,
            env=env,
            **more,
        )

    def placement(self, host: int | None = None) -> Placement:
        """`host`: bytes of a host's memory that its trainers may use, None while there is enough."""
        if not self.cuda:
            ranks = self.recipe.resources.train_ranks if self.trains else 1
            return place_on_cpu(self.recipe, ranks)
        placed, (recipe, why) = place(self.recipe, self.shape, self.gpus, host), self._settled
        if why is None:
            return placed
        requests = Reason("requests", f"{recipe.rollout.running} at once", why)
        return replace(placed, reasons=(requests, *placed.reasons))

    @cached_property
    def load(self) -> TrainerLoad | None:
        """What the trainer computes on its GPUs; None without any, or where the model's sizes are not known."""
        if self.shape is None or not self.gpus.trainer:
            return None
        return TrainerLoad(self.recipe, self.shape, len(self.gpus.trainer), self.gpus.pace, self.gpus.train_hosts)

    def transfers(self, placement: Placement) -> Transfers | None:
        """Of versions to other hosts; None where nothing is known of them."""
        served = {process.host for process in self.processes if process.role is Role.ENGINE} - {None}
        links = {host: machine.link for host, machine in self.fleet.items() if host in served and machine.link}
        if self.shape is None or not self.trains or not (self.cuda or links):
            return None
        step_s = self.load.step_seconds(placement.split) if self.load is not None else None
        return transfers(self.recipe, self.shape, len(served), links, step_s)

    def memory(self, placement: Placement, published_on_gpu: Collection[str] = ()) -> list[MemoryRow]:
        """`published_on_gpu`: trainers whose published versions lie on their GPU, those of others on the host."""
        rows, recipe, shape, device = [light_row("supervisor")], self.recipe, self.shape, self.choice.device
        for process in self.processes:
            if process.role is Role.ENGINE and shape:
                size = self.gpus.smallest(process.gpu_ids)
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
        return {process.name for process in self.processes if shared & set(process.gpu_ids)}

    def room_on_host(self, rows: Sequence[MemoryRow]) -> int | None:
        """What others leave trainers of a host that is too small for all of them, of the smallest such host; None where
        all fit."""
        others = [*(process.name for process in self.processes if process.role is not Role.TRAINER), "supervisor"]
        left = []
        for host in dict.fromkeys(process.host for process in self.processes if process.role is Role.TRAINER):
            machine = self.machines[host]
            if machine is None or total(rows, where="host", fixed=True, host=host) <= machine.system.memory_total:
                continue
            taken = total(rows, where="host", fixed=True, processes=others, host=host)
            left.append(machine.system.memory_total - taken)
        return min(left, default=None)

    def room_to_publish(self, rows: Sequence[MemoryRow], time_sharing: bool) -> set[str]:
        """Trainers whose GPU has room for two published versions beside all else; each rank finds out for itself
        (`weights.snapshot`). One that leaves its GPU to the engine keeps them on the host."""
        sizes, leaves = self.gpus.sizes, self.on_shared_gpus if time_sharing else set()
        held = {row.process: row.bytes for row in rows if row.component is Component.PUBLISHED}

        def fits(gpu: GpuId, trainer: str) -> bool:
            names = [process.name for process in self.processes if gpu in process.gpu_ids]
            need = on_gpu(solid(rows), names) + held[trainer] + SPARE_BYTES
            return gpu in sizes and need <= sizes[gpu]

        there = [p for p in self.processes if p.name in held and p.gpus and p.name not in leaves]
        return {p.name for p in there if all(fits(gpu, p.name) for gpu in p.gpu_ids)}


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
