"""The processes of an agent's host: started, watched and stopped by the launcher of a run on one host.

Their logs and configs lie in the agent's folder. A trainer's rank also writes to the run directory, which all hosts
with ranks must see: the order names a file there and what stands in it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from astracli.errors import AstraError
from astracli.hub.agent_types import AGENT_LOG_BYTES, Order
from astracli.launch.configs import interfaces
from astracli.launch.forks import Forks
from astracli.launch.launcher import Process
from astracli.launch.local import LocalLauncher, process_env
from astracli.launch.shared_dir import Proof
from astracli.plan.types import ProcessPlan
from astracli.process import children
from astracli.process.children import Child
from astracli.process.config import EngineConfig, EvalConfig, ProcessConfig, Role, RolloutConfig, TrainerConfig

CONFIGS: Mapping[Role, type[ProcessConfig]] = {
    Role.ENGINE: EngineConfig, Role.ROLLOUT: RolloutConfig, Role.TRAINER: TrainerConfig, Role.EVAL: EvalConfig
}  # fmt: skip
PLAN = TypeAdapter(ProcessPlan)


@dataclass(eq=False)
class Running:
    """A process that was started here."""

    child: Child | None
    """None: it could not be started."""
    role: Role | None
    log: Path
    position: int
    """Bytes of `log` that were there before."""
    told: int = 0
    """Bytes of it that the hub has."""
    code: int | None = None
    over: bool = False
    """Its end has been told."""


@dataclass(frozen=True)
class Local:
    """What processes of this host are told in the place of the first host's."""

    folder: Path
    """Where their logs, configs and staged weights are."""
    hub_url: str
    token: str
    address: str
    input: Callable[[str, list[Mapping[str, Any]]], Path]
    """Where the files of a path of the first host are here. Raises RunFailed."""


class HostProcesses:
    """Thread-safe."""

    def __init__(self, local: Local):
        self._here = local
        self._launcher: LocalLauncher | None = None
        self._running: dict[int, Running] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        """Nothing is started any more."""
        self._starting = threading.Lock()

    # ---- orders ------------------------------------------------------------------------------------------------------

    def carry_out(self, order: Order) -> None:
        if order.kind == "start":
            with self._starting:
                self._start(order)
        elif order.kind == "stacks":
            one = self._running.get(order.start)
            if one is not None and one.child is not None:
                one.child.print_stacks()
        elif order.kind == "stop":
            with self._lock:
                ending = [self._running[start].child for start in order.starts if start in self._running]
            there = [child for child in ending if child is not None]
            if there and self._launcher is not None:
                self._launcher.stop(there, order.grace_s)

    def _start(self, order: Order) -> None:
        """A process of the order. One that cannot be started has ended with 1, and its log says why."""
        log = self._here.folder / "logs" / f"start_{order.start}.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            process = self._local(order.document)
            launcher = self._launcher = self._launcher or self._make_launcher(process)
            while not (self._over.is_set() or launcher.ready()):
                time.sleep(0.05)
            if self._over.is_set():
                return
            name = self._here.folder / "logs" / f"attempt_{process.config.attempt}" / f"{process.name}.log"
            position = name.stat().st_size if name.exists() else 0
            child = launcher.start(process)
            running = Running(child, process.plan.role, child.log, position)
        except (AstraError, OSError, ValueError, KeyError) as error:
            hint = getattr(error, "hint", None)
            said = f"error: {error}\n" + (f"hint: {hint}\n" if hint else "")
            with contextlib.suppress(OSError):  # no room on the disk, for one: the end alone is told then
                log.write_text(said)
            running = Running(None, None, log, 0, code=1)
        with self._lock:
            self._running[order.start] = running

    def _make_launcher(self, process: Process) -> LocalLauncher:
        """As `launch.job` makes one: on a CPU with a fork server, which the first process of this host needs."""
        recipe, folder = process.config.recipe, self._here.folder
        if process.plan.gpus:
            return LocalLauncher(folder=folder)
        forks = Forks([process.plan], recipe, lambda plan: process_env(plan, recipe.launch.host))
        return LocalLauncher(forks=forks, folder=folder)

    def _local(self, document: Mapping[str, Any]) -> Process:
        """What the hub said, with the paths and addresses of this host."""
        plan = PLAN.validate_python(document["plan"])
        config = CONFIGS[plan.role].model_validate_json(json.dumps(document["config"]))
        here, stage = self._here, self._here.folder / "stage"

        def path(of_first: Path) -> Path:
            files = document["inputs"].get(str(of_first))
            return of_first if files is None else here.input(str(of_first), files)

        changes: dict[str, Any] = {
            "hub_url": here.hub_url, "token": here.token, "model_path": path(config.model_path)
        }  # fmt: skip
        if isinstance(config, TrainerConfig):  # all ranks write one run directory
            Proof(**document["shared"]).check(plan.host or "")
            changes["data_paths"] = {name: one and path(one) for name, one in config.data_paths.items()}
            changes["teacher_path"] = config.teacher_path and path(config.teacher_path)
        else:
            changes["run_dir"] = here.folder
        if isinstance(config, EngineConfig):
            changes["stage_dir"] = stage / config.name
        if isinstance(config, RolloutConfig):
            changes["engines"] = tuple(
                one.model_copy(update={"stage_dir": stage / one.name, "token": None}) for one in config.engines
            )
            changes["data_paths"] = {name: one and path(one) for name, one in config.data_paths.items()}
        env = {**interfaces(plan.role, here.address), **document["env"]}
        return Process(plan, config.model_copy(update=changes), env)

    # ---- what they do ------------------------------------------------------------------------------------------------

    def any_ended(self) -> bool:
        """Whether some end was not told yet."""
        with self._lock:
            return any(not one.over and (one.child is None or one.child.exited()) for one in self._running.values())

    def news(self, ends: bool = True) -> tuple[dict[str, Any], Callable[[], None]]:
        """(what is new, to be called once the hub has it). An end is told with the last bytes of its log; without
        `ends` none is."""
        with self._lock:
            news = {start: self._news(start, one, ends) for start, one in self._running.items() if not one.over}
        launcher = self._launcher

        def told() -> None:
            with self._lock:
                for start, (item, size) in news.items():
                    one = self._running[start]
                    one.told += size
                    one.over = item["exit_code"] is not None

        return {
            "processes": [item for item, _ in news.values()],
            "usage": dict(launcher.usage()) if launcher else {},
            "memory": dict(launcher.memory()) if launcher else {},
        }, told

    def _news(self, start: int, one: Running, ends: bool) -> tuple[dict[str, Any], int]:
        ended = ends and (one.child is None or one.child.exited())
        if ended and one.code is None and one.child is not None:
            assert self._launcher is not None
            self._launcher.stop([one.child], grace_s=0.5)  # and what it left behind
            one.code = one.child.exit_code()
        text, log_time = b"", 0.0
        with contextlib.suppress(OSError), one.log.open("rb") as log:
            log.seek(one.position + one.told)
            text, log_time = log.read(AGENT_LOG_BYTES), one.log.stat().st_mtime
        whole = len(text) < AGENT_LOG_BYTES
        item = {
            "start": start, "exit_code": one.code if ended and whole else None, "log_time": log_time,
            "offset": one.told, "text": base64.b64encode(text).decode(),
        }  # fmt: skip
        return item, len(text)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def end_all(self) -> None:
        self._over.set()
        with self._starting:
            launcher = self._launcher
        if launcher is None:
            return
        with self._lock:
            workers = [one.child for one in self._running.values() if one.child and one.role is Role.ROLLOUT]
        launcher.stop([child for child in workers if not child.exited()], children.GRACE_S)  # leases go back first
        launcher.close()

    def clean(self) -> None:
        for name in ("stage", "weights", "config"):
            shutil.rmtree(self._here.folder / name, ignore_errors=True)
