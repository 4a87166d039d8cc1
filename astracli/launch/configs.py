"""From a plan to what each of its processes is told, and how a trainer's ranks find each other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from astracli.config.recipe import Recipe
from astracli.engines.registry import of as engine_of
from astracli.launch.inputs import Inputs
from astracli.launch.launcher import Process
from astracli.launch.restarts import Retry
from astracli.machine.memory import Component
from astracli.plan.types import TRAINING, LaunchPlan, ProcessPlan
from astracli.process import ports as net
from astracli.process.config import (
    EngineAddress,
    EngineConfig,
    EvalConfig,
    ProcessConfig,
    Role,
    RolloutConfig,
    SampleFile,
    TrainerConfig,
)
from astracli.process.layout import WITHOUT_PEERS
from astracli.runs.run_dir import RunDir
from astracli.training import collective_check


@dataclass(frozen=True)
class RunContext:
    """What a command runs, and what all of its processes have in common."""

    recipe: Recipe
    plan: LaunchPlan
    run_dir: RunDir
    attempt: int
    inputs: Inputs
    resume_step: int | None = None
    """Steps that the checkpoint to go on from has trained; None for a new run."""
    initial: Path | None = None
    """Checkpoint of another run that this one starts with, weights and moments."""
    samples: SampleFile | None = None
    """What a rollout without a trainer writes."""
    start: int = 0
    """How often the supervisor has started the run again in this attempt."""
    save_s: float | None = None
    """How long a checkpoint may take that is asked for before the end; None: any time."""
    warm: bool = False
    """The run is there to fill the caches of kernels (`warm.py`)."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """Of this attempt: every request between its processes carries it."""

    @property
    def training(self) -> bool:
        return self.plan.command in TRAINING

    @property
    def settled(self) -> Recipe:
        """The recipe with what the plan derived in its place: what every process and the hub go by."""
        rollout = self.recipe.rollout.model_copy(update={"max_running_requests": self.plan.running_requests})
        return self.recipe.model_copy(update={"rollout": rollout})


@dataclass(frozen=True)
class Site:
    """Where the processes of another host listen."""

    address: str
    ports: tuple[int, ...]
    """Free ones, for its engines."""
    token: str = field(repr=False)
    """What they ask of their callers."""


def build(
    context: RunContext, hub_url: str, held: ExitStack, sites: Mapping[str, Site] = MappingProxyType({})
) -> list[Process]:
    """Every process of the plan, with ports that are theirs until `held` is closed. `sites`: the other hosts."""
    host, plan = context.recipe.launch.host, context.plan
    *ports, rendezvous = net.held_ports(sum(p.role is Role.ENGINE for p in plan.processes) + 1, host, held)
    here, stage = Site(host, tuple(ports), context.token), context.run_dir.stage.resolve()
    free = {name: iter(site.ports) for name, site in (*sites.items(), (None, here))}
    engines = {}
    for process in plan.processes:
        if process.role is Role.ENGINE:
            site = here if process.host is None else sites[process.host]
            address = net.url(site.address, next(free[process.host]))
            engines[process.name] = EngineAddress(
                name=process.name, url=address, stage_dir=stage / process.name, token=site.token
            )
    common: dict[str, Any] = {
        "run_dir": context.run_dir.path.resolve(),
        "attempt": context.attempt,
        "hub_url": hub_url,
        "token": context.token,
        "recipe": context.settled,
        "model_path": context.inputs.model,
        "engine": plan.choice.engine,
    }
    processes = []
    for process in plan.processes:
        own = common | {"name": process.name, "threads": process.threads}
        if process.host is not None:
            own |= _elsewhere(own["recipe"], sites[process.host])
        if process.role is Role.ENGINE:
            port = urlsplit(engines[process.name].url).port
            own |= {"port": port, "stage_dir": stage / process.name}
            config = _engine(context, process, own)
        else:
            beside = {
                p.name for p in plan.processes if p.host == process.host
            }  # a rollout worker has those of its host
            asked = [e for name, e in engines.items() if process.role is not Role.ROLLOUT or name in beside]
            config = _client(context, process, own | {"engines": tuple(asked)})
        env = _rank_env(process, host, rendezvous)
        if process.host is None:  # another host's agent knows its own interfaces
            env = {**interfaces(process.role, host), **env}
        processes.append(Process(process, config, env))
    return processes


def retry(context: RunContext, processes: Sequence[Process], held: ExitStack) -> Retry | None:
    """How trainer ranks on GPUs start once more when their first all-reduce fails; None for one rank, or on a CPU."""
    ranks = [process for process in processes if process.plan.role is Role.TRAINER]
    known = all(os.environ.get(name) == value for name, value in WITHOUT_PEERS.items())
    if len(ranks) < 2 or context.plan.choice.device != "cuda" or known:
        return None

    def again() -> list[Process]:
        (port,) = net.held_ports(1, context.recipe.launch.host, held)
        env = {**WITHOUT_PEERS, "MASTER_PORT": str(port)}
        return [replace(rank, env={**rank.env, **env}) for rank in ranks]

    different = " ".join(f"{name}={value}" for name, value in WITHOUT_PEERS.items())
    words = f"the {len(ranks)} training GPUs do not reach each other directly: their ranks run with {different}"
    return Retry(collective_check.BROKEN, frozenset(rank.name for rank in ranks), again, words)


def _elsewhere(recipe: Recipe, site: Site) -> dict[str, Any]:
    """What a process of another host is told differently. Its agent puts in the paths of its own host."""
    launch = recipe.launch.model_copy(update={"host": site.address})
    return {"recipe": recipe.model_copy(update={"launch": launch}), "token": site.token}


def _engine(context: RunContext, process: ProcessPlan, own: Mapping[str, Any]) -> ProcessConfig:
    plan, recipe = context.plan, context.recipe
    fraction = plan.placement.mem_fraction_static or engine_of(recipe).memory.share(recipe)
    return EngineConfig(
        **own,
        device=plan.choice.device,
        published=context.training,
        await_weights=context.resume_step is not None,
        time_sharing=process.name in plan.gpu_leases,
        mem_fraction_static=fraction * plan.gpu_share,
        staging=plan.placement.staging if process.gpus else "host",
        serving_attention=plan.choice.serving_attention,
        linear_attention=plan.choice.linear_attention,
        prefix_cache=plan.choice.prefix_cache,
    )


def _client(context: RunContext, process: ProcessPlan, own: Mapping[str, Any]) -> ProcessConfig:
    """Of a process that talks to the engines."""
    plan, leases = context.plan, tuple(context.plan.gpu_leases)
    if process.role is Role.ROLLOUT:
        return RolloutConfig(
            **own,
            data_paths=dict(context.inputs.data),
            gpu_leases=leases,
            samples=context.samples,
            generates=plan.command != "sft",
        )
    if process.role is Role.EVAL:
        out = context.run_dir.eval.resolve() if plan.command == "eval" else None
        return EvalConfig(**own, benchmarks=dict(context.inputs.benchmarks), out=out)
    here = [row for row in plan.memory if row.where == "host" and row.host == process.host]
    kept = [row for row in here if row.component is not Component.CHECKPOINT_COPY]
    return TrainerConfig(
        **own,
        device=plan.choice.device,
        attention=plan.choice.trainer_attention,
        gdn_backward=plan.choice.gdn_backward,
        resume_step=context.resume_step,
        initial=context.initial,
        start=context.start,
        split=plan.placement.split,
        shared=plan.placement.shared,
        gpu_leases=leases,
        leaves=any(name in leases for gpu in process.gpu_ids for name in plan.gpu_map[gpu]),
        warm_up=context.warm or (plan.choice.device == "cuda" and not leases),
        teacher_path=context.inputs.teacher,
        data_paths=dict(context.inputs.data) if plan.command == "sft" else {},
        host_bytes=sum(row.bytes for row in kept) if process.gpus else 0,
    )


def interfaces(role: Role, host: str) -> dict[str, str]:
    """Collectives listen where the run does: gloo and NCCL's bootstrap take their address from an interface. What the
    user's environment says is meant for other programs."""
    name = net.interface(host) if role in (Role.TRAINER, Role.ENGINE) else None
    if name is None:
        return {}
    family = "AF_INET6" if ":" in host else "AF_INET"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}", "NCCL_SOCKET_FAMILY": family}


def _rank_env(process: ProcessPlan, host: str, port: int) -> dict[str, str]:
    """torchrun's variables, for a trainer of several ranks. They meet on the host of rank 0, the first. A rank on a GPU
    sees that one alone."""
    if process.role is not Role.TRAINER:
        return {}
    return {
        "RANK": str(process.rank),
        "LOCAL_RANK": "0" if process.gpus else str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
