"""From a plan to processes: the config file of each (RUN_DIR/config/NAME.json, mode 0600), and how it is started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.launch.restarts import Retry
from astracli.plan.build import LaunchPlan, ProcessPlan
from astracli.plan.trainer import CHECKPOINT_COPY
from astracli.process.children import ChildSpec
from astracli.process.ports import free_ports
from astracli.process.worker import THREAD_VARIABLES, WorkerConfig
from astracli.runs.run_dir import RunDir, write_atomic
from astracli.training import collective_check

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""The supervisor has fetched everything; a child that would ask the network is wrong."""
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
"""A log is no terminal."""


@dataclass(frozen=True)
class RunContext:
    """What all processes of one run have in common."""

    recipe: Recipe
    plan: LaunchPlan
    run: RunDir
    attempt: int
    hub_url: str
    token: str
    paths: Mapping[str, Any]
    """{"model", "data", "benchmarks"}: local, as in `WorkerConfig.paths`."""
    resume: bool = False


def build(setting: RunContext, extra: Mapping[str, Mapping[str, Any]]) -> list[ChildSpec]:
    """Write the configs and return how to start each process. `extra`: role -> what only that role is told."""
    host = setting.recipe.launch.host
    engines = [process for process in setting.plan.processes if process.role == "engine"]
    *ports, rendezvous = free_ports(len(engines) + 1, host)
    addresses = [
        {
            "name": engine.name,
            "url": f"http://{host}:{port}",
            "stage_dir": str(setting.run.stage.resolve() / engine.name),
        }
        for engine, port in zip(engines, ports, strict=True)
    ]
    setting.run.config.mkdir(mode=0o700, parents=True, exist_ok=True)
    specs = []
    for process in setting.plan.processes:
        told = _placement(setting.plan, process) | dict(extra.get(process.role, {}))
        config = _config(setting, process, addresses, told)
        if process.role == "engine":
            number = engines.index(process)
            specs.append(_engine(setting, process, config, addresses[number], ports[number]))
        else:
            specs.append(_spec(setting, process, config, _rank_env(process, host, rendezvous)))
    return specs


def retry(setting: RunContext, specs: Sequence[ChildSpec]) -> Retry | None:
    """How trainer ranks on GPUs start once more when their first all-reduce fails; None for one rank, or on a CPU."""
    ranks = [spec for spec in specs if spec.role == "trainer"]
    known = all(os.environ.get(name) == value for name, value in collective_check.WITHOUT_PEERS.items())
    if len(ranks) < 2 or setting.plan.choice.device != "cuda" or known:
        return None

    def again() -> list[ChildSpec]:
        (port,) = free_ports(1, setting.recipe.launch.host)
        env = {**collective_check.WITHOUT_PEERS, "MASTER_PORT": str(port)}
        return [replace(spec, env={**spec.env, **env}) for spec in ranks]

    different = " ".join(f"{name}={value}" for name, value in collective_check.WITHOUT_PEERS.items())
    words = f"the {len(ranks)} training GPUs do not reach each other directly: their ranks run with {different}"
    return Retry(collective_check.BROKEN, frozenset(spec.name for spec in ranks), again, words)


def _placement(plan: LaunchPlan, process: ProcessPlan) -> dict[str, Any]:
    """What the plan decided about GPU memory, as `WorkerConfig.extra` of the process that must keep to it."""
    if process.role == "rollout":
        return {"gpu_leases": plan.gpu_leases} if plan.gpu_leases else {}
    if not process.gpus:
        return {}
    if process.role == "engine":
        return {
            "mem_fraction_static": plan.placement.mem_fraction_static,
            "time_sharing": process.name in plan.gpu_leases,
            "staging": plan.placement.staging,
        }
    split = plan.placement.split
    told = {**asdict(split), "shared": plan.placement.shared}
    leaves = any(name in plan.gpu_leases for gpu in process.gpus for name in plan.gpu_map[gpu])
    others = sum(row.bytes for row in plan.memory if row.where == "host" and row.what != CHECKPOINT_COPY)
    return {"placement": told | {"gpu_leases": plan.gpu_leases, "leaves": leaves, "host_bytes": others}}


def _engine(
    setting: RunContext, process: ProcessPlan, config: WorkerConfig, address: Mapping[str, str], port: int
) -> ChildSpec:
    """An engine that is started again holds no weights of a training run: it then waits until they are staged and
    checked. Without a trainer nobody would stage any, and the model's own are right."""
    Path(address["stage_dir"]).mkdir(parents=True, exist_ok=True)
    published = setting.plan.command == "train"
    extra = {"port": port, "stage_dir": address["stage_dir"], "published": published, **config.extra}
    config = replace(config, extra=extra)

    def before_restart() -> None:
        write(replace(config, extra={**config.extra, "await_weights": True}))

    spec = _spec(setting, process, config, {})
    if setting.plan.choice.engine == "sglang":
        return spec  # reports ready when its server answers, and starts without weights every time
    # with time sharing it may be asked to give its memory back at once; a token being generated would be in the way
    path = "model_info" if process.name in setting.plan.gpu_leases else "health_generate"
    spec = replace(spec, health_url=f"{address['url']}/{path}")
    return replace(spec, before_restart=before_restart) if published else spec


def _config(
    setting: RunContext, process: ProcessPlan, engines: Sequence[dict[str, str]], extra: Mapping[str, Any]
) -> WorkerConfig:
    return WorkerConfig(
        name=process.name,
        role=process.role,
        run_dir=setting.run.path.resolve(),
        hub_url=setting.hub_url,
        token=setting.token,
        recipe=_settled(setting),
        paths=dict(setting.paths),
        engines=list(engines),
        device=setting.plan.choice.device if process.role in ("engine", "trainer") else "cpu",
        threads=process.threads,
        resume=setting.resume,
        attempt=setting.attempt,
        backends=setting.plan.choice.settings(),
        extra=dict(extra),
    )


def _settled(setting: RunContext) -> Recipe:
    """The recipe with what the plan derived in its place."""
    rollout = setting.recipe.rollout.model_copy(update={"max_running_requests": setting.plan.running_requests})
    return setting.recipe.model_copy(update={"rollout": rollout})


def write(config: WorkerConfig) -> Path:
    """RUN_DIR/config/NAME.json; only its owner can read it, it holds the token."""
    path = RunDir(config.run_dir).config / f"{config.name}.json"
    write_atomic(path, json.dumps(config.document(), indent=1) + "\n", mode=0o600)
    return path


def _spec(setting: RunContext, process: ProcessPlan, config: WorkerConfig, env: Mapping[str, str]) -> ChildSpec:
    threads = dict.fromkeys(THREAD_VARIABLES, str(process.threads))
    return ChildSpec(
        name=process.name,
        role=process.role,
        argv=(process.python or sys.executable, "-m", process.module, str(write(config))),
        log=setting.run.attempt_logs(setting.attempt) / f"{process.name}.log",
        env={**OFFLINE, **QUIET, **threads, **_no_proxy(setting.recipe.launch.host), **process.env, **env},
        nice=process.nice,
        restarts=process.restarts,
        inherit=() if setting.run.lock_fd is None else (setting.run.lock_fd,),
    )


def _no_proxy(host: str) -> dict[str, str]:
    """A proxy of the user's must not be asked for processes of this run."""
    names = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost", host]))
    return {"NO_PROXY": names, "no_proxy": names}


def _rank_env(process: ProcessPlan, host: str, port: int) -> dict[str, str]:
    """torchrun's variables on one node, for a trainer of several ranks. A rank on a GPU sees that one alone."""
    if process.role != "trainer":
        return {}
    return {
        "RANK": str(process.rank),
        "LOCAL_RANK": "0" if process.gpus else str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }
