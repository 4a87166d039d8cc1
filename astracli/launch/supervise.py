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
from typing import Any

from astracli.errors import RunFailed
from astracli.launch.restarts import End, Restarts, Resumes, Retry, ended, first_cause
from astracli.launch.status import Hub, Outcome, Phase, Status
from astracli.process import children as local
from astracli.process.children import Child, ChildSpec, MemorySampler
from astracli.process.console import say
from astracli.process.health import answers
from astracli.process.signals import signals
from astracli.process.worker import TERM_EXIT

STALL_S = 5.0
"""A longer gap between two looks means that this process itself stood still (a suspended laptop): nobody is blamed."""
RANKS_S = 3.0
"""A trainer's rank has ended: so long the others have to end too. Which of them was the cause is then known."""


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
        resumes: Resumes | None = None,
        restart_window_s: float = 3600.0,
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
        self.resumes = resumes
        self._restarts = Restarts(restart_window_s)
        self._retry = retry
        self._retried = False
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
            if self.children.get(child.name) is child:
                self._check_heartbeat(child, now)
        if self.resumes is not None:
            self.resumes.reached(self._trained())

    def _trained(self) -> int | None:
        """Steps that the trainer has trained; None before it says so."""
        said = [self.status[name].progress.get("step") for name in self._main]
        return max((int(step) for step in said if step is not None), default=None)

    def _forgive(self, gap_s: float) -> None:
        for child in self.children.values():
            child.started += gap_s
        for status in self.status.values():
            if status.heard is not None:
                status.heard += gap_s

    def _on_exit(self, child: Child) -> None:
        code = self._reap(child)
        ending = self.phase in ("finishing", "stopping")
        if self._retry is not None and code == self._retry.code and child.name in self._retry.names and not ending:
            self._start_again(child, self._retry)
        elif code == 0 and child.name in self._main:
            self._done.add(child.name)
            self.status[child.name].state = "done"
        elif not (ending and code in (0, TERM_EXIT)):
            self._lost(ended(child, code))

    def _reap(self, child: Child) -> int:
        local.stop([child], grace_s=0.5)  # what it left behind in its session
        code = child.reap()
        del self.children[child.name]
        return code

    def _start_again(self, gone: Child, retry: Retry) -> None:
        """All children of the retry anew, once; `gone` is the first of them that gave up."""
        self._retry, self._retried = None, True
        said = gone.last_lines(1)
        local.stop([self.children.pop(name) for name in retry.names if name in self.children], grace_s=0.5)
        self.notes.append(f"{retry.words} ({'; '.join(said)})" if said else retry.words)
        say(f"warning: {self.notes[-1]}")
        for spec in retry.specs():
            self._hub.release_worker(spec.name)
            self.status[spec.name] = Status(spec.role)
            self.children[spec.name] = Child(spec)

    def _lost(self, end: End) -> None:
        """A child is gone that should not be: start it again, go on from a checkpoint, or end the run."""
        child, status = end.child, self.status[end.child.name]
        self._hub.release_worker(child.name)
        if child.name in self._main and self.resumes is not None:
            self._lost_trainer(end, self.resumes)
            return
        recent, window = self._restarts.recent(child.name), f"{self._restarts.window_s:g} s"
        if recent >= child.spec.restarts:
            after = f" after {recent} restarts within {window}" if recent else ""
            raise RunFailed(f"`{child.name}` {end.what}{after}{_quote(child)}", self._hint() or None)
        last = "".join(f" ({line})" for line in child.last_lines(1))
        again = f"it is started again, time {recent + 1} of {child.spec.restarts} within {window}"
        say(f"warning: `{child.name}` {end.what}{last}; {again}")
        if child.spec.before_restart is not None:
            child.spec.before_restart()
        self._restarts.add(child.name)
        self.status[child.name] = Status(child.spec.role, restarts=status.restarts + 1)
        self.children[child.name] = Child(child.spec)

    def _lost_trainer(self, end: End, resumes: Resumes) -> None:
        """Go on from the newest checkpoint when what ended a rank may pass; else end the run with its cause."""
        began = time.monotonic()
        end = first_cause([end, *self._other_ends()])
        step = resumes.reached(self._trained())
        refusal = None if end.cause is None else resumes.refusal(step, end.cause)
        if end.cause is None or refusal is not None:
            words = f"`{end.child.name}` {end.what}" + (f"; {refusal}" if refusal else "")
            raise RunFailed(words + _quote(end.child), self._hint() or None)
        self._enter("resuming")
        say(f"warning: `{end.child.name}` {end.what} at step {step} ({end.cause}): everything is stopped, to go on")
        local.stop(list(self.children.values()), also=self.memory.seen())
        self.children.clear()
        start = resumes.take(step, end.cause, began)
        where = f"the checkpoint of step {start.step}" if start.step else "the beginning, there is no checkpoint yet"
        say(f"warning: the run goes on from {where}, time {len(resumes.taken)} of {resumes.limit}")
        self._start_all(start.specs, start.retry)
        self._looked = time.monotonic()

    def _other_ends(self) -> list[End]:
        """The other ranks that end by themselves now: a rank that is gone takes them with it."""
        deadline = time.monotonic() + RANKS_S
        names = [name for name in self._main if name in self.children]
        while names and time.monotonic() < deadline and not all(self.children[name].exited() for name in names):
            time.sleep(0.02)
        dead = sorted((self.children[name] for name in names if self.children[name].exited()), key=Child.log_time)
        ends = [ended(child, self._reap(child)) for child in dead]
        return [end for end in ends if end.code != 0]

    def _start_all(self, specs: Sequence[ChildSpec], retry: Retry | None) -> None:
        """Every child anew; ranks that were started once more for their link keep what was different then."""
        again = {spec.name: spec for spec in retry.specs()} if self._retried and retry is not None else {}
        self._retry = None if self._retried else retry
        self._done.clear()
        self.specs = {spec.name: again.get(spec.name, spec) for spec in specs}
        for name, spec in self.specs.items():
            before = self.status.get(name)
            self.status[name] = Status(spec.role, restarts=before.restarts if before else 0)
            self.children[name] = Child(spec)

    def _check_ready(self, now: float) -> None:
        late = [child for child in self.children.values() if not self._ready(child)]
        if not late and self.phase in ("starting", "resuming"):
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
        self._lost(End(child, None, f"sent no heartbeat for {self._heartbeat_timeout_s:g} s (last: {words})"))

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
        if self.resumes is not None:
            self.resumes.close()
        self._phases = self.phases()
        self._phase_began = time.monotonic()


def _quote(child: Child, count: int = 20) -> str:
    lines = child.last_lines(count)
    if not lines:
        return f"; it wrote nothing to {child.spec.log}"
    return f"; its last lines in {child.spec.log}:\n" + "\n".join(f"  {line}" for line in lines)
