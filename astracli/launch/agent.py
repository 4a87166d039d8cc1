"""`astra agent`: starts, watches and stops the processes of a run on this host, as its hub orders.

The launcher is that of a run on one host. What processes write, their ends and their memory go to the hub each second;
what they ask the hub goes through the relay. Their files lie in the agent's folder. They end with the agent, and the
agent ends them when the hub says so, when it is told to end, or when it has not heard the hub for its lease.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import TypeAdapter

from astracli.errors import AstraError, RunFailed, UserError
from astracli.hub.agent_types import AGENT_LOG_BYTES, Joined, Order, Orders
from astracli.hub.wire import unpack_answer
from astracli.launch import fleet
from astracli.launch.agent_hub import Hub, Revoked
from astracli.launch.agent_relay import relay_app
from astracli.launch.configs import interfaces
from astracli.launch.forks import Forks
from astracli.launch.host_inputs import found
from astracli.launch.launcher import Process
from astracli.launch.local import LocalLauncher, process_env
from astracli.machine import read as machine_read
from astracli.plan.types import ProcessPlan
from astracli.process import children, ports
from astracli.process.children import Child
from astracli.process.config import EngineConfig, EvalConfig, ProcessConfig, Role, RolloutConfig, TrainerConfig
from astracli.process.console import say
from astracli.process.open_files import raise_open_files
from astracli.process.server import ServerThread
from astracli.weights.receive.host_cache import HostCache

CONFIGS: Mapping[Role, type[ProcessConfig]] = {
    Role.ENGINE: EngineConfig, Role.ROLLOUT: RolloutConfig, Role.TRAINER: TrainerConfig, Role.EVAL: EvalConfig
}  # fmt: skip
PORTS = 32
"""Free ports that an agent offers for the engines of its host."""
REPORT_S = 1.0
LOOK_S = 0.1
ORDERS_WAIT_S = 5.0
PLAN = TypeAdapter(ProcessPlan)


@dataclass(eq=False)
class Running:
    """A process that this agent has started."""

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


@dataclass
class AgentSetup:
    """What the command says."""

    url: str
    ticket: str
    folder: Path
    cache: Path
    name: str
    """How a host that joins later is called."""
    address: str | None = None
    wait_s: float = 600.0
    """For a hub that is not there yet."""
    versions: Mapping[str, str] = field(default_factory=fleet.versions)


class Agent:
    """One host's agent. `run` returns when the run has ended, or raises RunFailed."""

    def __init__(self, setup: AgentSetup, interrupted: threading.Event):
        self._setup, self._interrupted = setup, interrupted
        self._hub, self._ident = Hub(setup.url, setup.ticket), uuid.uuid4().hex
        self._address = setup.address or _own_address(setup.url)
        self._launcher: LocalLauncher | None = None
        self._running: dict[int, Running] = {}
        self._lock = threading.RLock()
        self._heard = time.monotonic()
        self._done = 0
        """Number of the last order that was carried out."""
        self._end = threading.Event()
        """The hub has ordered the end."""
        self._failure: RunFailed | None = None
        self._over = threading.Event()
        """Nothing is started any more."""
        self._starting = threading.Lock()
        self._held = contextlib.ExitStack()
        """The ports that were named to the hub are this host's processes'."""

    def run(self) -> str:
        """-> why it ended, in words."""
        raise_open_files()
        joined = self._join()
        say(f"joined run {joined.run} from {self._address}; files in {self._setup.folder}")
        cache = HostCache(self._setup.url, joined.token, self._setup.folder / "weights")
        app = relay_app(self._setup.url, joined.token, joined.host_token, cache)
        with contextlib.ExitStack() as stack:
            stack.callback(self._hub.close)
            stack.enter_context(self._held)
            stack.callback(cache.close)
            relay = ServerThread(app, ports.bind()).start()
            stack.callback(relay.stop)
            self._relay_url, self._host_token = relay.url, joined.host_token
            stack.callback(self._clean)
            stack.callback(self._end_all)
            orders = threading.Thread(target=self._follow, name="orders", daemon=True)
            orders.start()
            reason = self._watch(joined.lease_s)
            failure = self._failure  # what comes after this agent has left is none
            self._over.set()
            self._end_all()
            with contextlib.suppress(httpx.TransportError, RunFailed):
                self._report(ends=False)  # what this agent has ended did not fail: its host is gone
                self._hub.post("/agent/leave", {"reason": reason})
        if failure is not None:
            raise failure
        return reason

    def _join(self) -> Joined:
        facts = machine_read.probe()
        body = {
            "ident": self._ident, "address": self._address, "ports": ports.held_ports(PORTS, self._address, self._held),
            "versions": dict(self._setup.versions), "facts": facts.document(), "name": self._setup.name,
        }  # fmt: skip
        deadline, said = time.monotonic() + self._setup.wait_s, False
        while True:
            try:
                reply = self._hub.post("/agent/join", body)
            except httpx.TransportError as error:
                if time.monotonic() > deadline or self._interrupted.is_set():
                    raise RunFailed(
                        f"no hub at {self._setup.url} for {self._setup.wait_s:g} s: {error}",
                        "start `astra train` there first, with launch.host an address that this host reaches",
                    ) from None
                if not said:
                    say(f"no hub at {self._setup.url} yet: waiting for it")
                said = True
                self._interrupted.wait(0.5)
                continue
            except Revoked:
                raise UserError(
                    f"the hub at {self._setup.url} does not take this token",
                    "a token is good for one agent of one run: take the file that `astra train` names now",
                ) from None
            joined: Joined = unpack_answer(Joined, reply.content, "application/json", "POST /agent/join")
            self._hub.token = joined.token
            self._heard = time.monotonic()
            return joined

    # ---- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, lease_s: float) -> str:
        """Until it is to end -> why."""
        told = 0.0
        while True:
            if self._interrupted.is_set():
                return "was told to leave"
            if self._failure is not None:
                return self._failure.message
            if self._end.is_set():
                return "the run has ended"
            if (silent := time.monotonic() - self._heard) > lease_s:
                self._failure = RunFailed(
                    f"the hub at {self._setup.url} was not heard for {silent:.0f} s: this host's processes were ended",
                    "start the agent again when the hub can be reached, with the token file of then",
                )
                return "has not heard the hub for its lease"
            if self._any_ended() or time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                self._try(self._report)
            self._end.wait(LOOK_S)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except httpx.TransportError:
            return
        except RunFailed as error:
            self._failure = error

    def _any_ended(self) -> bool:
        with self._lock:
            return any(not one.over and (one.child is None or one.child.exited()) for one in self._running.values())

    def _report(self, ends: bool = True) -> None:
        """Tell the hub what is new. An end is told with the last bytes of its log; without `ends` none is."""
        with self._lock:
            news = {start: self._news(start, one, ends) for start, one in self._running.items() if not one.over}
        launcher = self._launcher
        body = {
            "processes": [item for item, _ in news.values()],
            "usage": dict(launcher.usage()) if launcher else {},
            "memory": dict(launcher.memory()) if launcher else {},
        }
        self._hub.post("/agent/report", body)
        self._heard = time.monotonic()
        with self._lock:
            for start, (item, size) in news.items():
                one = self._running[start]
                one.told += size
                one.over = item["exit_code"] is not None

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

    # ---- orders ------------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Carry out the hub's orders, each once, until it says the end."""
        while not (self._end.is_set() or self._interrupted.is_set() or self._failure):
            try:
                reply = self._hub.post("/agent/orders", {"done": self._done, "wait_s": ORDERS_WAIT_S})
                self._heard = time.monotonic()
                orders: Orders = unpack_answer(Orders, reply.content, "application/json", "POST /agent/orders")
                for order in orders.orders:
                    if order.number > self._done:
                        self._carry_out(order)
                        self._done = order.number
            except httpx.TransportError:
                time.sleep(0.2)
            except RunFailed as error:
                self._failure = error

    def _carry_out(self, order: Order) -> None:
        if order.kind == "end":
            self._end.set()
        elif order.kind == "start":
            with self._starting:
                self._start(order)
        elif order.kind == "stacks":
            one = self._running.get(order.start)
            if one is not None and one.child is not None:
                one.child.print_stacks()
        else:
            with self._lock:
                ending = [self._running[start].child for start in order.starts if start in self._running]
            there = [child for child in ending if child is not None]
            if there and self._launcher is not None:
                self._launcher.stop(there, order.grace_s)

    def _start(self, order: Order) -> None:
        """A process of the order. One that cannot be started has ended with 1, and its log says why."""
        log = self._setup.folder / "logs" / f"start_{order.start}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            process = self._local(order.document)
            launcher = self._launcher = self._launcher or self._make_launcher(process)
            while not (self._over.is_set() or launcher.ready()):
                time.sleep(0.05)
            if self._over.is_set():
                return
            config = process.config
            name = self._setup.folder / "logs" / f"attempt_{config.attempt}" / f"{process.name}.log"
            position = name.stat().st_size if name.exists() else 0
            child = launcher.start(process)
            running = Running(child, process.plan.role, child.log, position)
        except (AstraError, OSError, ValueError, KeyError) as error:
            hint = getattr(error, "hint", None)
            log.write_text(f"error: {error}\n" + (f"hint: {hint}\n" if hint else ""))
            running = Running(None, None, log, 0, code=1)
        with self._lock:
            self._running[order.start] = running

    def _make_launcher(self, process: Process) -> LocalLauncher:
        """As `launch.job` makes one: on a CPU with a fork server, which the first process of this host needs."""
        recipe = process.config.recipe
        if process.plan.gpus:
            return LocalLauncher()
        return LocalLauncher(forks=Forks([process.plan], recipe, lambda plan: process_env(plan, recipe.launch.host)))

    def _local(self, document: Mapping[str, Any]) -> Process:
        """What the hub said, with the paths and addresses of this host."""
        plan = PLAN.validate_python(document["plan"])
        config = CONFIGS[plan.role].model_validate_json(json.dumps(document["config"]))
        stage = self._setup.folder.resolve() / "stage"
        changes: dict[str, Any] = {
            "run_dir": self._setup.folder.resolve(), "hub_url": self._relay_url, "token": self._host_token,
            "model_path": self._input(document, config.model_path),
        }  # fmt: skip
        if isinstance(config, EngineConfig):
            changes["stage_dir"] = stage / config.name
        if isinstance(config, RolloutConfig):
            changes["engines"] = tuple(
                one.model_copy(update={"stage_dir": stage / one.name, "token": None}) for one in config.engines
            )
            changes["data_paths"] = {
                name: None if path is None else self._input(document, path) for name, path in config.data_paths.items()
            }
        env = {**interfaces(plan.role, self._address), **document["env"]}
        return Process(plan, config.model_copy(update=changes), env)

    def _input(self, document: Mapping[str, Any], path: Path) -> Path:
        files = document["inputs"].get(str(path))
        if files is None:
            return path
        return found(str(path), files, self._setup.cache, self._hub.fetch)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _end_all(self) -> None:
        self._over.set()
        with self._starting:
            launcher = self._launcher
        if launcher is None:
            return
        with self._lock:
            workers = [one.child for one in self._running.values() if one.child and one.role is Role.ROLLOUT]
        launcher.stop([child for child in workers if not child.exited()], children.GRACE_S)  # leases go back first
        launcher.close()

    def _clean(self) -> None:
        for name in ("stage", "weights", "config"):
            shutil.rmtree(self._setup.folder / name, ignore_errors=True)


def _own_address(url: str) -> str:
    """The address of this host that reaches the hub's."""
    where = httpx.URL(url)
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((where.host, where.port or 80))
        except OSError as error:
            raise UserError(f"`{where.host}` is not reached from this host: {error.strerror or error}") from None
        return str(probe.getsockname()[0])


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "astra" / "inputs"
