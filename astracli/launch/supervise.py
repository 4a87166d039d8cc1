"""The supervisor: starts the children, watches them, restarts those that may be, and ends all of them.

First failure ends the run, with that child's last lines. Everything is judged by process ids that we started and by
monotonic clocks; nothing is ever found by name or by port.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from astracli.errors import RunFailed
from astracli.launch import local
from astracli.launch.health import answers
from astracli.launch.local import Child, ChildSpec, MemorySampler, exit_words
from astracli.launch.signals import signals
from astracli.talk import say
from astracli.workers.common import TERM_EXIT

Phase = Literal["starting", "running", "finishing", "stopping"]

STALL_S = 5.0
"""A longer gap between two looks means that this process itself stood still (a suspended laptop): nobody is blamed."""


class Hub(Protocol):
    """What the supervisor asks of the hub. Python calls in this process."""

    def alive(self) -> bool:
        """The hub's server still serves."""

    def request_stop(self) -> None:
        """Answer `stop` to every worker from now on."""

    def release_worker(self, name: str) -> None:
        """A worker died: its leases go back, its engine is down."""

    def pending_evals(self) -> int:
        """Evaluations announced and not done."""


@dataclass
class Status:
    """The last word of one child."""

    role: str
    state: str = "starting"
    waiting: str | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    heard: float | None = None
    """Monotonic time of the last heartbeat; None before the first."""
    healthy: bool = False
    """`health_url` answered 200."""
    restarts: int = 0

    def words(self) -> str:
        """What it waits for, or its state."""
        if self.waiting:
            return self.waiting if self.waiting.startswith("waiting") else f"waiting for {self.waiting}"
        return self.state if self.heard is not None else "has not reported yet"


@dataclass(frozen=True)
class Retry:
    """Children that are all started once more, as other specs, when one of them ends with a code that asks for it."""

    code: int
    names: frozenset[str]
    specs: Callable[[], Sequence[ChildSpec]]
    """Asked when it is needed: a port must be free then."""
    words: str
    """What was wrong and what is different now."""


@dataclass(frozen=True)
class Outcome:
    interrupted: bool
    """Before everything was done; a signal that comes later only hurries the others' end."""
    phases: dict[str, float]
    """Seconds of wall time in each phase."""


class Supervisor:
    """Runs children until all of the main role ended well, one failed, or a signal came."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        hub: Hub,
        *,
        main_role: str,
        ready_timeout_s: float = 600.0,
        heartbeat_timeout_s: float = 60.0,
        token: str = "",
        hint: Callable[[], str] = lambda: "",
        tick: Callable[[Supervisor], None] = lambda supervisor: None,
        memory: MemorySampler | None = None,
        retry: Retry | None = None,
        interrupted: threading.Event | None = None,
        poll_s: float = 0.1,
    ):
        self.specs = {spec.name: spec for spec in specs}
        self.status = {spec.name: Status(spec.role) for spec in specs}
        self.phase: Phase = "starting"
        self.children: dict[str, Child] = {}
        self.memory = memory or MemorySampler()
        self.notes: list[str] = []
        """What the run did to go on, for its summary."""
        self._retry = retry
        self._hub = hub
        self._main = {spec.name for spec in specs if spec.role == main_role}
        self._done: set[str] = set()
        self._ready_timeout_s = ready_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._token = token
        self._hint = hint
        self._tick = tick
        self._poll_s = poll_s
        self._interrupted = interrupted
        self._phases: dict[str, float] = {}
        self._phase_began = time.monotonic()
        self._looked = time.monotonic()

    def on_status(self, body: Mapping[str, Any]) -> None:
        """A heartbeat arrived (called by the hub, in its thread)."""
        status = self.status.get(str(body.get("name")))
        if status is not None:
            status.state = str(body.get("state", "starting"))
            status.waiting = body.get("waiting")
            status.progress = dict(body.get("progress") or {})
            status.heard = time.monotonic()

    def run(self) -> Outcome:
        """Start, watch, end. Returns when nothing of ours is left running. Raises RunFailed with the reason."""
        with contextlib.nullcontext(self._interrupted) if self._interrupted else signals() as interrupted:
            try:
                for spec in self.specs.values():
                    if not interrupted.is_set():
                        self.children[spec.name] = Child(spec)
                self.memory.start(lambda: {child.pid: name for name, child in list(self.children.items())})
                while not interrupted.is_set() and not self._finished():
                    self._look()
                    self._tick(self)
                    interrupted.wait(self._poll_s)
                before_its_end = interrupted.is_set()
                self._enter("stopping")
                self._hub.request_stop()
                if not before_its_end:
                    self._let_go(interrupted)
            finally:
                self._end_all()
        return Outcome(before_its_end, self.phases())

    def phases(self) -> dict[str, float]:
        """Seconds spent in each phase so far."""
        spent = self._phases.get(self.phase, 0.0) + time.monotonic() - self._phase_began
        return self._phases | {self.phase: spent}

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self._phases = self.phases()
            self.phase = phase
            self._phase_began = time.monotonic()

    def _finished(self) -> bool:
        """All of the main role ended well, and no evaluation is pending that somebody could still do."""
        if self._done < self._main:
            return False
        self._enter("finishing")
        evaluating = any(child.spec.role == "eval" for child in self.children.values())
        return not (evaluating and self._hub.pending_evals() > 0)

    def _look(self) -> None:
        """One round over all children. Raises RunFailed."""
        now = time.monotonic()
        if now - self._looked > STALL_S:
            self._forgive(now - self._looked)
        self._looked = now
        if not self._hub.alive():
            raise RunFailed("the hub stopped serving", self._hint() or None)
        dead = sorted((child for child in self.children.values() if child.exited()), key=Child.log_time)
        for child in dead:
            if self.children.get(child.name) is child:
                self._on_exit(child)
        self._check_ready(now)
        for child in list(self.children.values()):
            self._check_heartbeat(child, now)

    def _forgive(self, gap_s: float) -> None:
        for child in self.children.values():
            child.started += gap_s
        for status in self.status.values():
            if status.heard is not None:
                status.heard += gap_s

    def _on_exit(self, child: Child) -> None:
        local.stop([child], grace_s=0.5)  # what it left behind in its session
        code = child.reap()
        del self.children[child.name]
        ending = self.phase in ("finishing", "stopping")
        if self._retry is not None and code == self._retry.code and child.name in self._retry.names and not ending:
            self._start_again(child, self._retry)
        elif code == 0 and child.name in self._main:
            self._done.add(child.name)
            self.status[child.name].state = "done"
        elif not (ending and code in (0, TERM_EXIT)):
            self._lost(child, f"ended with {exit_words(code)}" + (" before the run was done" if code == 0 else ""))

    def _start_again(self, ended: Child, retry: Retry) -> None:
        """All children of the retry anew, once; `ended` is the first of them that gave up."""
        self._retry = None
        said = ended.last_lines(1)
        local.stop([self.children.pop(name) for name in retry.names if name in self.children], grace_s=0.5)
        self.notes.append(f"{retry.words} ({'; '.join(said)})" if said else retry.words)
        say(f"warning: {self.notes[-1]}")
        for spec in retry.specs():
            self._hub.release_worker(spec.name)
            self.status[spec.name] = Status(spec.role)
            self.children[spec.name] = Child(spec)

    def _lost(self, child: Child, what: str) -> None:
        """A child is gone that should not be: start it again, or end the run."""
        status = self.status[child.name]
        self._hub.release_worker(child.name)
        if status.restarts >= child.spec.restarts:
            after = f" after {status.restarts} restarts" if status.restarts else ""
            raise RunFailed(f"`{child.name}` {what}{after}{_quote(child)}", self._hint() or None)
        last = "".join(f" ({line})" for line in child.last_lines(1))
        again = f"it is started again, time {status.restarts + 1} of {child.spec.restarts}"
        say(f"warning: `{child.name}` {what}{last}; {again}")
        if child.spec.before_restart is not None:
            child.spec.before_restart()
        self.status[child.name] = Status(child.spec.role, restarts=status.restarts + 1)
        self.children[child.name] = Child(child.spec)

    def _check_ready(self, now: float) -> None:
        late = [child for child in self.children.values() if not self._ready(child)]
        if not late and self.phase == "starting":
            self._enter("running")
        if any(now - child.started > self._ready_timeout_s for child in late):
            names = ", ".join(f"`{child.name}` ({self.status[child.name].words()})" for child in late)
            raise RunFailed(
                f"not ready after {self._ready_timeout_s:g} s: {names}{_quote(late[0])}",
                self._hint() or "raise launch.ready_timeout_s if it was only slow",
            )

    def _ready(self, child: Child) -> bool:
        status = self.status[child.name]
        if child.spec.reports and status.state not in ("ready", "done"):
            return False
        if child.spec.health_url and not status.healthy:
            status.healthy = answers(child.spec.health_url, self._token)
        return status.healthy or not child.spec.health_url

    def _check_heartbeat(self, child: Child, now: float) -> None:
        """A child that was heard of once and fell silent hangs: print its stacks to its log, then give it up."""
        heard = self.status[child.name].heard
        if heard is None or now - heard <= self._heartbeat_timeout_s or child.exited():
            return
        child.signal(signal.SIGUSR1)
        time.sleep(0.3)
        words = self.status[child.name].words()
        local.stop([child], grace_s=1.0)
        del self.children[child.name]
        self._lost(child, f"sent no heartbeat for {self._heartbeat_timeout_s:g} s (last: {words})")

    def _let_go(self, interrupted: threading.Event, patience_s: float = 1.5) -> None:
        """The hub says stop: give everyone a moment to end by itself."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and not interrupted.is_set():
            if all(child.exited() for child in self.children.values()):
                return
            self._tick(self)
            interrupted.wait(0.05)

    def _end_all(self) -> None:
        self._enter("stopping")
        seen = self.memory.seen()
        self.memory.close()
        local.stop(list(self.children.values()), also=seen)
        self.children.clear()
        self._phases = self.phases()
        self._phase_began = time.monotonic()


def _quote(child: Child, count: int = 20) -> str:
    lines = child.last_lines(count)
    if not lines:
        return f"; it wrote nothing to {child.spec.log}"
    return f"; its last lines in {child.spec.log}:\n" + "\n".join(f"  {line}" for line in lines)
