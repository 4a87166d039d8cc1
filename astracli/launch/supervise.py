"""The supervisor: starts a run's processes, watches them, restarts those that may be, and ends all of them.

The first failure ends the run, with that process's last lines. The launcher starts the processes; only those that it
has started are watched and ended, nothing is found by name or by port. Time is measured by monotonic clocks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from astracli.config.recipe_run import LaunchTable
from astracli.engines import registry as engines
from astracli.engines.contract import explain
from astracli.errors import RunFailed
from astracli.launch.away import Away
from astracli.launch.launcher import Launcher, Process, Started
from astracli.launch.restarts import End, Restarts, Resumes, Retry, ended, first_cause
from astracli.process.config import Role
from astracli.process.console import say
from astracli.process.signals import signals
from astracli.process.worker import LOST_EXIT, Status

if TYPE_CHECKING:
    from astracli.hub.store import HubStore

Phase = Literal["starting", "running", "resuming", "finishing", "stopping"]
STALL_S = 5.0
"""A longer gap between two looks means that this process itself stood still (a suspended laptop): nobody is blamed."""
LEFT_BEHIND_S = 0.5
"""Patience with what a process that has ended left behind."""
STACKS_S = 0.3
"""For a process to write its stacks down."""
RANKS_S = 3.0
"""A trainer's rank has ended: so long the others have to end too. Which of them was the cause is then known."""


class Supervisor:
    """Runs processes until all of the main role ended well, one failed, or a signal came."""

    def __init__(
        self,
        processes: Sequence[Process],
        launcher: Launcher,
        hub: HubStore,
        *,
        main_role: Role,
        limits: LaunchTable,
        hub_alive: Callable[[], bool] = lambda: True,
        hint: Callable[[], str] = lambda: "",
        hopeless: Callable[[], RunFailed | None] = lambda: None,
        tick: Callable[[Supervisor], None] = lambda supervisor: None,
        retry: Retry | None = None,
        resumes: Resumes | None = None,
        interrupted: threading.Event | None = None,
        poll_s: float = 0.1,
        log: Path | None = None,
        save: threading.Event | None = None,
        save_s: float | None = None,
    ):
        """`log`: the file of the supervisor's own warnings. `save`: once it is set, the main role makes a checkpoint
        and ends, and the run with it; after `save_s` seconds without one too."""
        self.processes = {process.name: process for process in processes}
        self.status = {name: Status() for name in self.processes}
        self._planned = frozenset(self.processes)
        """Without those of hosts that join later."""
        self.phase: Phase = "starting"
        self.children: dict[str, Started] = {}
        self.notes: list[str] = []
        """What the run did to go on, for its summary."""
        self.resumes = resumes
        self._restarts = Restarts(limits.restart_window_s)
        self._retry = retry
        self._retried = False
        self._launcher = launcher
        self._hub, self._hub_alive = hub, hub_alive
        self._main = {process.name for process in processes if process.plan.role is main_role}
        self._done: set[str] = set()
        self.away = Away()
        self._limits = limits
        self._hint, self._hopeless = hint, hopeless
        self._tick = tick
        self._poll_s = poll_s
        self._log = log
        self._interrupted = interrupted
        self._save, self._save_s = save or threading.Event(), save_s
        self._saving: float | None = None
        """Since when a checkpoint is asked for."""
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
            status.error = body.get("error") or status.error
            status.heard = time.monotonic()
        for warning in body.get("warnings") or ():
            say(f"warning: {body.get('name')}: {warning}")
            self.notes.append(str(warning).partition("\n")[0])

    def warn(self, line: str) -> None:
        """Say a line about the run that goes on, in its log too, and keep it for its summary."""
        say(f"warning: {line}")
        self.notes.append(line)
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def run(self) -> bool:
        """Start, watch, end; True when it was interrupted before everything was done: a signal that comes later only
        hurries the others' end. Returns when nothing of ours is left running. Raises RunFailed with the reason."""
        with contextlib.nullcontext(self._interrupted) if self._interrupted else signals() as interrupted:
            try:
                while not (interrupted.is_set() or self._launcher.ready()):
                    self._tick(self)
                    interrupted.wait(self._poll_s)
                for process in self.processes.values():
                    if not interrupted.is_set():
                        self.children[process.name] = self._launcher.start(process)
                while not interrupted.is_set() and not self._finished():
                    self._look()
                    self._tick(self)
                    interrupted.wait(self._poll_s)
                before_its_end = interrupted.is_set() or self._saving is not None
                self._enter("stopping")
                self._hub.request_stop()
                if not before_its_end:
                    self._let_go(interrupted)
            finally:
                self._end_all()
        return before_its_end

    def hosts(self) -> Mapping[str, str]:
        """Other hosts of the run -> whether their agent is there and what it runs, in words."""
        return self._launcher.hosts()

    def host_of(self, name: str) -> str | None:
        """Where a process runs; None: on the host of the supervisor."""
        return self.processes[name].plan.host

    def phases(self) -> dict[str, float]:
        """Seconds spent in each phase so far."""
        spent = self._phases.get(self.phase, 0.0) + time.monotonic() - self._phase_began
        return self._phases | {self.phase: spent}

    def _start_anew(self, process: Process, restarts: int = 0) -> None:
        """In the place of one that is gone. `restarts`: how often it was started again by itself."""
        self.status[process.name] = Status(restarts=restarts)
        self.children[process.name] = self._launcher.start(process)

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self._phases = self.phases()
            self.phase = phase
            self._phase_began = time.monotonic()

    def _finished(self) -> bool:
        """All of the main role ended well, and no evaluation is pending that somebody could still do. After a
        checkpoint was asked for, evaluations are left for later."""
        if self._save.is_set() and self._saved():
            return True
        if self._done < self._main:
            return False
        self._enter("finishing")
        evaluating = any(self.processes[name].plan.role is Role.EVAL for name in self.children)
        return not (evaluating and self._hub.pending_evals() > 0)

    def _saved(self) -> bool:
        """Ask for a checkpoint, once; whether there is one, or none can be expected."""
        if self._saving is None:
            self._saving = time.monotonic()
            self._hub.save_requested = True
            say("a checkpoint is made, then the run ends")
        if self._save_s is not None and time.monotonic() - self._saving > self._save_s:
            self.warn(f"no checkpoint within {self._save_s:g} s: the run goes on from the one before")
            return True
        return self._done >= self._main or self.phase in ("starting", "resuming")

    def _look(self) -> None:
        """One round over all children. Raises RunFailed."""
        now = time.monotonic()
        if now - self._looked > STALL_S:
            for status in self.status.values():
                status.started += now - self._looked
                status.heard = None if status.heard is None else status.heard + now - self._looked
        self._looked = now
        if not self._hub_alive():
            raise RunFailed("the hub stopped serving", self._hint() or None)
        if (end := self._hopeless()) is not None:
            raise end
        for child in _dead(self.children.values()):
            if self.children.get(child.name) is child:
                self._on_exit(child)
        self._look_for_hosts(now)
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

    def _on_exit(self, child: Started) -> None:
        code = self._reap(child)
        ending = self.phase in ("finishing", "stopping")
        if self._retry is not None and code == self._retry.code and child.name in self._retry.names and not ending:
            self._start_again(child, self._retry)
        elif code == 0 and child.name in self._main:
            self._done.add(child.name)
            self.status[child.name].state = "done"
        elif not (ending and code == 0):  # somebody else's SIGTERM would leave evaluations undone
            self._lost(ended(child, code))

    def _reap(self, child: Started) -> int:
        self._launcher.stop([child], LEFT_BEHIND_S)
        del self.children[child.name]
        return child.exit_code()

    def _start_again(self, gone: Started, retry: Retry) -> None:
        """All processes of the retry anew, once; `gone` is the first of them that gave up."""
        self._retry, self._retried = None, True
        said = gone.last_lines(1)
        left = [self.children.pop(name) for name in retry.names if name in self.children]
        self._launcher.stop(left, LEFT_BEHIND_S)
        self.warn(f"{retry.words} ({'; '.join(said)})" if said else retry.words)
        for process in retry.processes():
            self._hub.release_worker(process.name)
            self._start_anew(process)

    def _lost(self, end: End) -> None:
        """A child is gone that should not be: start it again, go on from a checkpoint, or end the run."""
        child, process = end.child, self.processes[end.child.name]
        self._hub.release_worker(child.name)
        if end.code == LOST_EXIT and process.plan.host is not None:
            self._lost_host(process, process.plan.host)
            return
        if child.name in self._main and self.resumes is not None:
            self._lost_trainer(end, self.resumes)
            return
        recent, window = self._restarts.recent(child.name), f"{self._restarts.window_s:g} s"
        if recent >= process.plan.restarts:
            after = f" after {recent} restarts within {window}" if recent else ""
            known = engines.get(process.config.engine).hints if process.plan.role is Role.ENGINE else ()
            hints = filter(None, [explain(known, child.last_lines(200))[1], self._hint()])
            raise RunFailed(f"`{child.name}` {end.what}{after}{self._quote(child)}", "; ".join(hints) or None)
        last = "".join(f" ({line})" for line in child.last_lines(1))
        again = f"it is started again, time {recent + 1} of {process.plan.restarts} within {window}"
        say(f"warning: `{child.name}` {end.what}{last}; {again}")
        self._restarts.add(child.name)
        self._start_anew(process.again(), self.status[child.name].restarts + 1)

    def _lost_host(self, process: Process, host: str) -> None:
        """A process has ended with its host's agent: the run goes on without, and starts it where an agent comes again.
        A deterministic run ends: a wave that lost an engine begins anew from the checkpoint. So does a run that lost a
        rank of its trainer."""
        words = f"the agent of host `{host}` {self._launcher.gone(host)}"
        if self._limits.deterministic or process.name in self._main:
            raise RunFailed(f"{words}, and `{process.name}` with it", self._hint() or None)
        if not self.away.waits_for(host):
            self.warn(f"{words}: the run goes on without it, and uses it again when an agent is there")
        self.away.add(process)
        self.status[process.name] = Status(waiting=f"an agent on `{host}`", restarts=self.status[process.name].restarts)

    def _look_for_hosts(self, now: float) -> None:
        """Start again what waits for a host that is there now, and what a host that joined brings. Raises RunFailed
        when no engine is left for long."""
        for process in self._launcher.newcomers():
            self.processes[process.name] = process
            self._start_anew(process)
        for process in self.away.back(self._launcher.has):
            self._start_anew(process, self.status[process.name].restarts + 1)
        there = [name for name in self.children if self.processes[name].plan.role is Role.ENGINE]
        # evaluations use engines of the plan alone, and at the end nobody else needs any
        engines_left = any(self.phase != "finishing" or name in self._planned for name in there)
        if (words := self.away.too_long(engines_left, now, self._limits.ready_timeout_s)) is not None:
            raise RunFailed(words, self._hint() or None)

    def _lost_trainer(self, end: End, resumes: Resumes) -> None:
        """Go on from the newest checkpoint when what ended a rank may pass; else end the run with its cause."""
        began = time.monotonic()
        end = first_cause([end, *self._other_ends()])
        step = resumes.reached(self._trained())
        refusal = None if end.cause is None else resumes.refusal(step, end.cause)
        if end.cause is None or refusal is not None:
            words = f"`{end.child.name}` {end.what}" + (f"; {refusal}" if refusal else "")
            raise RunFailed(words + self._quote(end.child), self._hint() or None)
        self._enter("resuming")
        say(f"warning: `{end.child.name}` {end.what} at step {step} ({end.cause}): everything is stopped, to go on")
        self._launcher.stop_all()
        self.children.clear()
        start = resumes.take(step, end.cause, began)
        where = f"the checkpoint of step {start.step}" if start.step else "the beginning, there is no checkpoint yet"
        say(f"warning: the run goes on from {where}, time {len(resumes.taken)} of {resumes.limit}")
        self._start_all(start.processes, start.retry)
        self._looked = time.monotonic()

    def _other_ends(self) -> list[End]:
        """The other ranks that end by themselves now: a rank that is gone takes them with it."""
        deadline = time.monotonic() + RANKS_S
        names = [name for name in self._main if name in self.children]
        while names and time.monotonic() < deadline and not all(self.children[name].exited() for name in names):
            time.sleep(0.02)
        ends = [ended(child, self._reap(child)) for child in _dead(self.children[name] for name in names)]
        return [end for end in ends if end.code != 0]

    def _start_all(self, processes: Sequence[Process], retry: Retry | None) -> None:
        """Every process anew; ranks that were started once more for their link keep what was different then."""
        again = {rank.name: rank for rank in retry.processes()} if self._retried and retry is not None else {}
        self._retry = None if self._retried else retry
        self._done.clear()
        self.away.clear()
        planned = {process.name: again.get(process.name, process) for process in processes}
        joined = {name: process.again() for name, process in self.processes.items() if name not in planned}
        self.processes = planned | joined
        for name, process in self.processes.items():
            self._start_anew(process, self.status[name].restarts)

    def _check_ready(self, now: float) -> None:
        late = [child for name, child in self.children.items() if self.status[name].state not in ("ready", "done")]
        if not late and self.phase in ("starting", "resuming"):
            self._enter("running")
        if any(now - self.status[child.name].started > self._limits.ready_timeout_s for child in late):
            names = ", ".join(f"`{child.name}` ({self.status[child.name].words()})" for child in late)
            raise RunFailed(
                f"not ready after {self._limits.ready_timeout_s:g} s: {names}{self._quote(late[0])}",
                self._hint() or "raise launch.ready_timeout_s if it was only slow",
            )

    def _check_heartbeat(self, child: Started, now: float) -> None:
        """A child that was heard of once and fell silent hangs: print its stacks to its log, then give it up."""
        heard = self.status[child.name].heard
        if heard is None or now - heard <= self._limits.heartbeat_timeout_s or child.exited():
            return
        child.print_stacks()
        time.sleep(STACKS_S)
        words = self.status[child.name].words()
        self._launcher.stop([child], grace_s=1.0)
        del self.children[child.name]
        self._lost(End(child, None, f"sent no heartbeat for {self._limits.heartbeat_timeout_s:g} s (last: {words})"))

    def _quote(self, child: Started, count: int = 20) -> str:
        """What it said last: in its log, and in its heartbeat where the log does not have it."""
        lines, said = child.last_lines(count), (self.status[child.name].error or "").partition("\n")[0]
        where = f"; its last lines in {child.log}:" if lines else f"; it wrote nothing to {child.log}"
        if said and said not in "\n".join(lines):
            return "\n  ".join([f"; it said: {said}", *([where[2:], *lines] if lines else [])])
        return "\n  ".join([where, *lines])

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
        self._launcher.close()
        self.children.clear()
        if self.resumes is not None:
            self.resumes.close()
        self._phases = self.phases()
        self._phase_began = time.monotonic()


def _dead(children: Iterable[Started]) -> list[Started]:
    """Those that have ended, the first to fall silent first."""
    return sorted((child for child in children if child.exited()), key=methodcaller("log_time"))
