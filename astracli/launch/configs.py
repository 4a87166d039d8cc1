"""From a plan to what each of its processes is told, and how a trainer's ranks find each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from astracli.config.recipe import Recipe
from astracli.engines.registry import of as engine_of
from astracli.launch.inputs import Inputs
from astracli.launch.launcher import Process
from astracli.launch.restarts import Retry
from astracli.machine.component import Component
from astracli.plan.types import LaunchPlan, ProcessPlan
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
from astracli.process.ports import free_ports
from astracli.runs.run_dir import RunDir
from astracli.training import collective_check


@dataclass(frozen=True)
class Setting:
    """What all processes of one run have in common."""

    recipe: Recipe
    plan: LaunchPlan
    run: RunDir
    attempt: int
    hub_url: str
    token: str
    inputs: Inputs
    resume_step: int | None = None
    """Steps that the checkpoint to go on from has trained; None for a new run."""
    start: int = 0
    """How often the supervisor has started the run again in this attempt."""
    samples: SampleFile | None = None
    """What a rollout without a trainer writes."""


def build(setting: Setting) -> list[Process]:
    """Every process of the plan, with ports that are free now."""
    host, plan = setting.recipe.launch.host, setting.plan
    names = [process.name for process in plan.processes if process.role is Role.ENGINE]
    *ports, rendezvous = free_ports(len(names) + 1, host)
    stage = setting.run.stage.resolve()
    engines = {
        name: EngineAddress(name=name, url=f"http://{host}:{port}", stage_dir=stage / name)
        for name, port in zip(names, ports, strict=True)
    }
    processes = []
    for process in plan.processes:
        if process.role is Role.ENGINE:
            config: ProcessConfig = _engine(setting, process, engines[process.name], ports[names.index(process.name)])
        else:
            config = _client(setting, process, tuple(engines.values()))
        processes.append(Process(process, config, _rank_env(process, host, rendezvous)))
    return processes


def retry(setting: Setting, processes: Sequence[Process]) -> Retry | None:
    """How trainer ranks on GPUs start once more when their first all-reduce fails; None for one rank, or on a CPU."""
    ranks = [process for process in processes if process.plan.role is Role.TRAINER]
    known = all(os.environ.get(name) == value for name, value in collective_check.WITHOUT_PEERS.items())
    if len(ranks) < 2 or setting.plan.choice.device != "cuda" or known:
        return None

    def again() -> list[Process]:
        (port,) = free_ports(1, setting.recipe.launch.host)
        env = {**collective_check.WITHOUT_PEERS, "MASTER_PORT": str(port)}
        return [replace(rank, env={**rank.env, **env}) for rank in ranks]

    different = " ".join(f"{name}={value}" for name, value in collective_check.WITHOUT_PEERS.items())
    words = f"the {len(ranks)} training GPUs do not reach each other directly: their ranks run with {different}"
    return Retry(collective_check.BROKEN, frozenset(rank.name for rank in ranks), again, words)


def _common(setting: Setting, process: ProcessPlan) -> dict[str, Any]:
    """The fields of `ProcessConfig`. The recipe holds what the plan derived in its place."""
    rollout = setting.recipe.rollout.model_copy(update={"max_running_requests": setting.plan.running_requests})
    return {
        "name": process.name,
        "run_dir": setting.run.path.resolve(),
        "attempt": setting.attempt,
        "hub_url": setting.hub_url,
        "token": setting.token,
        "recipe": setting.recipe.model_copy(update={"rollout": rollout}),
        "model_path": setting.inputs.model,
        "engine": setting.plan.choice.engine,
        "threads": process.threads,
    }


def _engine(setting: Setting, process: ProcessPlan, address: EngineAddress, port: int) -> EngineConfig:
    plan, recipe = setting.plan, setting.recipe
    return EngineConfig(
        **_common(setting, process),
        device=plan.choice.device,
        port=port,
        stage_dir=address.stage_dir,
        published=plan.command == "train",
        await_weights=setting.resume_step is not None,
        time_sharing=process.name in plan.gpu_leases,
        mem_fraction_static=plan.placement.mem_fraction_static or engine_of(recipe).memory.share(recipe),
        staging=plan.placement.staging if process.gpus else "host",
        serving_attention=plan.choice.serving_attention,
        linear_attention=plan.choice.linear_attention,
    )


def _client(setting: Setting, process: ProcessPlan, engines: tuple[EngineAddress, ...]) -> ProcessConfig:
    """Of a process that talks to the engines."""
    plan, common = setting.plan, _common(setting, process) | {"engines": engines}
    leases = tuple(plan.gpu_leases)
    if process.role is Role.ROLLOUT:
        return RolloutConfig(**common, data_path=setting.inputs.data, gpu_leases=leases, samples=setting.samples)
    if process.role is Role.EVAL:
        out = setting.run.eval.resolve() if plan.command == "eval" else None
        return EvalConfig(**common, benchmarks=dict(setting.inputs.benchmarks), out=out)
    kept = [row for row in plan.memory if row.where == "host" and row.component is not Component.CHECKPOINT_COPY]
    return TrainerConfig(
        **common,
        device=plan.choice.device,
        attention=plan.choice.trainer_attention,
        gdn_backward=plan.choice.gdn_backward,
        resume_step=setting.resume_step,
        start=setting.start,
        split=plan.placement.split,
        shared=plan.placement.shared,
        gpu_leases=leases,
        leaves=any(name in leases for gpu in process.gpus for name in plan.gpu_map[gpu]),
        host_bytes=sum(row.bytes for row in kept) if process.gpus else 0,
    )


def _rank_env(process: ProcessPlan, host: str, port: int) -> dict[str, str]:
    """torchrun's variables on one node, for a trainer of several ranks. A rank on a GPU sees that one alone."""
    if process.role is not Role.TRAINER:
        return {}
    return {
        "RANK": str(process.rank),
        "LOCAL_RANK": "0" if process.gpus else str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
