"""`astra agent`: carries out on this host what the hub of a run orders, and tells it what comes of that.

What processes write, their ends and their memory go to the hub each second; what they ask the hub goes through the
relay. They end with the agent, and the agent ends them when the hub says so, when it is told to end, or when it has not
heard the hub for its lease.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from astracli.errors import RunFailed, UserError
from astracli.hub.agent_types import Joined, Orders
from astracli.hub.wire import unpack_answer
from astracli.launch import fleet
from astracli.launch.agent_hub import Hub, Revoked
from astracli.launch.agent_processes import HostProcesses, Local
from astracli.launch.agent_relay import Beats, relay_app
from astracli.launch.host_inputs import found
from astracli.machine import read as machine_read
from astracli.process import ports
from astracli.process.console import say
from astracli.process.open_files import raise_open_files
from astracli.process.server import ServerThread
from astracli.weights.receive.host_cache import HostCache

PORTS = 32
"""Free ports that an agent offers for the engines of its host."""
REPORT_S = 1.0
LOOK_S = 0.1
ORDERS_WAIT_S = 5.0


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
    read_again: Callable[[], str] | None = None
    """The token that is there now: a run that is resumed writes new ones. None: there is only this one."""


class Agent:
    """One host's agent. `run` returns when the run has ended, or raises RunFailed."""

    def __init__(self, setup: AgentSetup, interrupted: threading.Event):
        self._setup, self._interrupted = setup, interrupted
        self._hub, self._ident = Hub(setup.url, setup.ticket), uuid.uuid4().hex
        self._address = setup.address or _own_address(setup.url)
        self._heard = time.monotonic()
        self._done = 0
        """Number of the last order that was carried out."""
        self._end = threading.Event()
        """The hub has ordered the end."""
        self._failure: RunFailed | None = None
        self._beats = Beats()
        self._held = contextlib.ExitStack()
        """The ports that were named to the hub are this host's processes'."""

    def run(self) -> str:
        """-> why it ended, in words."""
        raise_open_files()
        setup, joined = self._setup, self._join()
        say(f"joined run {joined.run} from {self._address}; files in {setup.folder}")
        cache = HostCache(setup.url, joined.token, setup.folder / "weights")
        app = relay_app(setup.url, joined.token, joined.host_token, cache, self._beats)
        with contextlib.ExitStack() as stack:
            stack.callback(self._hub.close)
            stack.enter_context(self._held)
            stack.callback(cache.close)
            relay = ServerThread(app, ports.bind()).start()
            stack.callback(relay.stop)
            stack.callback(self._beats.over.set)
            local = Local(
                setup.folder,
                relay.url,
                joined.host_token,
                self._address,
                lambda path, files: found(path, files, setup.cache, self._hub.fetch),
            )
            processes = HostProcesses(local)
            stack.callback(processes.clean)
            stack.callback(processes.end_all)
            threading.Thread(target=self._follow, args=[processes], name="orders", daemon=True).start()
            reason = self._watch(processes, joined.lease_s)
            failure = self._failure  # what comes after this agent has left is none
            processes.end_all()
            with contextlib.suppress(httpx.TransportError, RunFailed):
                # what this agent has ended did not fail: its host is gone
                self._report(processes, ends=False)
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
                body["facts"] = facts.model_copy(update={"link": self._hub.link()}).document()
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
                fresh = self._setup.read_again() if self._setup.read_again is not None else self._hub.token
                if fresh != self._hub.token:
                    self._hub.token = fresh
                    continue
                raise UserError(
                    f"the hub at {self._setup.url} does not take this token",
                    "a token is good for one agent of one run: take the file that `astra train` names now",
                ) from None
            joined: Joined = unpack_answer(Joined, reply.content, "application/json", "POST /agent/join")
            self._hub.token = joined.token
            self._heard = time.monotonic()
            return joined

    # ---- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, processes: HostProcesses, lease_s: float) -> str:
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
            if self._beats.urgent.is_set() or processes.any_ended() or time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                self._try(lambda: self._report(processes))
            self._end.wait(LOOK_S)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except httpx.TransportError:
            return
        except RunFailed as error:
            self._failure = error

    def _report(self, processes: HostProcesses, ends: bool = True) -> None:
        body, told = processes.news(ends)
        beats = self._beats.take()
        try:
            reply = self._hub.post("/agent/report", {**body, "beats": beats})
        except (httpx.TransportError, RunFailed):
            self._beats.put_back(beats)
            raise
        self._heard = time.monotonic()
        self._beats.stop = bool(reply.json()["stop"])
        told()

    def _follow(self, processes: HostProcesses) -> None:
        """Carry out the hub's orders, each once, until it says the end."""
        while not (self._end.is_set() or self._interrupted.is_set() or self._failure):
            try:
                reply = self._hub.post("/agent/orders", {"done": self._done, "wait_s": ORDERS_WAIT_S})
                self._heard = time.monotonic()
                orders: Orders = unpack_answer(Orders, reply.content, "application/json", "POST /agent/orders")
                for order in orders.orders:
                    if order.number <= self._done:
                        continue
                    if order.kind == "end":
                        self._end.set()
                    processes.carry_out(order)
                    self._done = order.number
            except httpx.TransportError:
                time.sleep(0.2)
            except RunFailed as error:
                self._failure = error


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
