"""A supervisor with processes that small modules stand for, and what is needed to watch them."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import configs
import psutil

from astracli.config.recipe_run import LaunchTable
from astracli.launch.launcher import Process
from astracli.launch.local import LocalLauncher
from astracli.launch.supervise import Supervisor
from astracli.plan.types import ProcessPlan
from astracli.process.children import ChildSpec
from astracli.process.config import ProcessConfig, Role

SLEEP = "import time; time.sleep(60)"
FAMILY = """
import signal, subprocess, sys, time
def spawn(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], **options).pid
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


class FakeHub:
    def __init__(self) -> None:
        self.living = True
        self.stops = 0
        self.released: list[str] = []
        self.pending = 0
        self.save_requested = False

    def alive(self) -> bool:
        return self.living

    def request_stop(self) -> None:
        self.stops += 1

    def release_worker(self, name: str) -> None:
        self.released.append(name)

    def pending_evals(self) -> int:
        return self.pending


def child_spec(logs: Path, name: str, code: str, **more: Any) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", FAMILY + textwrap.dedent(code)), logs / f"{name}.log", **more)


MADE: dict[Role, Callable[..., ProcessConfig]] = {
    Role.ENGINE: configs.engine,
    Role.ROLLOUT: configs.rollout,
    Role.TRAINER: configs.trainer,
    Role.EVAL: configs.evaluation,
}


def process(
    logs: Path, name: str, code: str, role: Role | None = None, restarts: int = 0, env: dict[str, str] | None = None,
    **told: Any,
) -> Process:  # fmt: skip
    """One process of a run in `logs`, which a module with this code stands for."""
    role, module = role or Role(name), f"{name}_{len(list(logs.glob('*.py')))}"
    (logs / f"{module}.py").write_text(FAMILY + textwrap.dedent(code))
    search = {"PYTHONPATH": os.pathsep.join([str(logs), *sys.path])}
    plan = ProcessPlan(name, role, module, gpus=(), threads=1, nice=0, restarts=restarts, env=search)
    stage = {"stage_dir": logs / "stage"} if role is Role.ENGINE else {}
    return Process(plan, MADE[role](**stage, **told, name=name, run_dir=logs), env or {})


def log(logs: Path, name: str) -> Path:
    return logs / "logs" / "attempt_1" / f"{name}.log"


def supervisor(processes: list[Process], hub: FakeHub | None = None, forks: Any = None, **more: Any) -> Supervisor:
    hub = hub or FakeHub()
    limits = LaunchTable(**{name: float(more.pop(name)) for name in LaunchTable.model_fields.keys() & more})
    fields: dict[str, Any] = dict(main_role=Role.TRAINER, limits=limits, hub_alive=hub.alive, poll_s=0.02)
    launcher = more.pop("launcher", None) or LocalLauncher(sample_s=0.1, forks=forks)
    return Supervisor(processes, launcher, hub, **(fields | more))  # type: ignore[arg-type]


def report(name: str, state: str = "ready", waiting: str | None = None, **progress: Any) -> dict[str, Any]:
    return {"name": name, "pid": 1, "state": state, "waiting": waiting, "progress": progress}


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
