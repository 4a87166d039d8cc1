"""The launcher of this machine: each process is a child of this one and leads a session of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from astracli.launch.forks import Forks
from astracli.launch.launcher import Process, Started
from astracli.plan.types import ProcessPlan
from astracli.process import children
from astracli.process.atomic import write_atomic
from astracli.process.children import Child, ChildSpec, MemorySampler
from astracli.process.config import EngineConfig
from astracli.runs.run_dir import RunDir

OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
"""The supervisor has fetched everything; a child that would ask the network is wrong."""
PYTHON = (sys.executable, "-P", "-m")
"""Nothing of the working directory is imported in the place of a module."""
QUIET = {"TQDM_DISABLE": "1"}
"""A log is no terminal."""


def child_spec(process: Process, lock_fd: int | None = None, folder: Path | None = None) -> ChildSpec:
    """Write its config, which only its owner can read: it holds the token. Returns how the process is started.
    `lock_fd`: holds the run directory for as long as the process lives. `folder`: where config and log go, in the
    place of the run directory."""
    plan, config = process.plan, process.config
    run = RunDir(folder or config.run_dir)
    run.config.mkdir(mode=0o700, parents=True, exist_ok=True)
    document = run.config / f"{plan.name}.json"
    write_atomic(document, config.model_dump_json(indent=1) + "\n", mode=0o600)
    if isinstance(config, EngineConfig):
        config.stage_dir.mkdir(parents=True, exist_ok=True)
    return ChildSpec(
        name=plan.name,
        argv=(*([plan.python, "-m"] if plan.python else PYTHON), plan.module, str(document)),
        log=run.attempt_logs(config.attempt) / f"{plan.name}.log",
        env={
            **process_env(plan, config.recipe.launch.host),
            **process.env,
            **({"PYTHONSAFEPATH": "1"} if plan.python else {}),
        },  # -P, for a Python that may not know it
        nice=plan.nice,
        inherit=() if lock_fd is None else (lock_fd,),
    )


def process_env(plan: ProcessPlan, host: str) -> dict[str, str]:
    """What a process of that plan has over the supervisor's environment."""
    return {**OFFLINE, **QUIET, **_no_proxy(host), **plan.env}


def _no_proxy(host: str) -> dict[str, str]:
    """A proxy of the user's must not be asked for processes of this run."""
    names = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost", host]))
    return {"NO_PROXY": names, "no_proxy": names}


class LocalLauncher:
    """`launcher.Launcher` on this machine."""

    def __init__(
        self,
        lock_fd: int | None = None,
        sample_s: float = 1.0,
        forks: Forks | None = None,
        folder: Path | None = None,
    ):
        """`folder`: of configs and logs; None: the run directory."""
        self._lock_fd, self._folder = lock_fd, folder
        self._forks = forks
        self._children: dict[str, Child] = {}
        self._memory = MemorySampler(sample_s)

    def ready(self) -> bool:
        return self._forks is None or self._forks.ready()

    def has(self, host: str | None) -> bool:
        return host is None

    def newcomers(self) -> Sequence[Process]:
        return ()

    def hosts(self) -> Mapping[str, str]:
        return {}

    def gone(self, host: str) -> str:
        return "is not this host"

    def start(self, process: Process) -> Child:
        child = Child(
            child_spec(process, self._lock_fd, self._folder),
            partial(self._forks.fork, process.plan) if self._forks else None,
        )
        self._children[child.name] = child
        self._memory.start(self._names)
        return child

    def _names(self) -> dict[int, str]:
        """Process id -> name, of everything started."""
        forks = {} if self._forks is None or self._forks.pid is None else {self._forks.pid: "fork_server"}
        return forks | {child.pid: name for name, child in list(self._children.items())}

    def stop(self, started: Sequence[Started], grace_s: float) -> None:
        ending = [child for child in self._children.values() if child in started]
        children.stop(ending, grace_s=grace_s)
        for child in ending:
            del self._children[child.name]

    def stop_all(self) -> None:
        seen = self._memory.seen()
        if self._forks is not None:  # it is wanted again when the run goes on from a checkpoint
            seen = [process for process in seen if process.pid != self._forks.pid]
        children.stop(list(self._children.values()), also=seen)
        self._children.clear()

    def close(self) -> None:
        self._memory.close()
        if self._forks is not None:
            self._forks.close()
        self.stop_all()

    def usage(self) -> Mapping[str, tuple[int, int]]:
        return self._memory.latest

    def memory(self) -> Mapping[str, Any]:
        sampler = self._memory
        return {
            "peak_bytes": sampler.peak_bytes, "kind": sampler.kind, "peak_bytes_by_process": dict(sampler.peak_by_name)
        }  # fmt: skip
