"""Children on this machine: started in their own session, watched without reaping, stopped with all their descendants.

Only processes that we started, and what they started, are ever signalled: by id, verified by creation time.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import psutil

from astracli.process.worker import LOST_EXIT, TERM_EXIT

if TYPE_CHECKING:
    from astracli.process.forking import Forked

GRACE_S = 2.0
"""Between TERM and KILL. With the hub's last second and the summary it keeps a stop under five seconds."""
PSS_S = 10.0
"""Between two walks over all pages, in seconds, while nothing grows: what was shared may be no more."""
GROWTH = 1.02
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


Fork: TypeAlias = "Callable[[ChildSpec, int], Forked | None]"
"""(what, open file for its stdout and stderr) -> the child, or None."""


@dataclass(frozen=True)
class ChildSpec:
    """How to start one child."""

    name: str
    argv: tuple[str, ...]
    log: Path
    """stdout and stderr, appended."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set over this process's environment."""
    nice: int = 0
    inherit: tuple[int, ...] = ()
    """File descriptors that stay open in it."""

    def environment(self) -> dict[str, str]:
        return environment(self.env)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """All variables of a child for which `env` is set."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", **env}


class Child:
    """One running process and the session it leads."""

    def __init__(self, spec: ChildSpec, fork: Fork | None = None):
        """`fork`: how it is forked from a process that has imported what it needs. Without it, and when that returns
        None, a new process is started."""
        self.name, self.log = spec.name, spec.log
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("ab") as log:
            self._log_start = log.tell()
            self._popen = (fork(spec, log.fileno()) if fork is not None else None) or subprocess.Popen(
                spec.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=spec.environment(),
                start_new_session=True, pass_fds=spec.inherit,
            )  # fmt: skip
        self.pid = self._popen.pid
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(self.pid)
            if spec.nice:
                self._process.nice(spec.nice)

    def exited(self) -> bool:
        """True when the process has ended. It stays a zombie, so that its id and group id cannot be given to others."""
        if self._popen.returncode is not None or self._process is None:
            return self._popen.poll() is not None
        try:
            return bool(self._process.status() == psutil.STATUS_ZOMBIE)
        except _GONE:
            return True

    def exit_code(self) -> int:
        """Of an ended process (negative: the signal that killed it). Call after its group is stopped."""
        return self._popen.wait()

    def print_stacks(self) -> None:
        """Ask the process alone for every thread's stack, in its log (`process/worker.py`)."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)

    def signal_group(self, signum: int) -> None:
        """Signal the process group that it leads. Nothing once it is reaped: the id may be another's."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def descendants(self) -> list[psutil.Process]:
        """Children of children, as far as parent links still lead to them."""
        if self._process is None:
            return []
        try:
            return self._process.children(recursive=True)
        except psutil.Error:
            return []

    def last_lines(self, count: int = 20) -> list[str]:
        """End of what this process wrote (not of an earlier attempt's log)."""
        try:
            with self.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - 64 * 1024))
                return last_lines(log, count)
        except OSError:
            return []

    def log_time(self) -> float:
        try:
            return self.log.stat().st_mtime
        except OSError:
            return 0.0


def last_lines(stream: IO[bytes], count: int) -> list[str]:
    lines = deque((line.decode("utf-8", "replace").rstrip() for line in stream), maxlen=count)
    return [line for line in lines if line]


def exit_words(code: int) -> str:
    """`exit code 3`, or `signal 15 (SIGTERM)`; of what nobody here does, who may have done it."""
    if code == TERM_EXIT:
        return f"exit code {code} (somebody sent it SIGTERM)"
    if code == LOST_EXIT:
        return "the agent of its host"
    if code >= 0:
        return f"exit code {code}"
    try:
        killed = ": killed from outside, or by the system for want of memory" if code == -signal.SIGKILL else ""
        return f"signal {-code} ({signal.Signals(-code).name}{killed})"
    except ValueError:
        return f"signal {-code}"


def stop(children: Sequence[Child], also: Iterable[psutil.Process] = (), grace_s: float = GRACE_S) -> None:
    """End children with everything they started: TERM, then KILL after `grace_s`.

    `also`: descendants seen earlier, which may have left their session or lost their parent since.
    """
    strays: dict[int, psutil.Process] = {p.pid: p for p in also}
    for child in children:
        strays |= {p.pid: p for p in child.descendants()}
    _signal_all(children, strays.values(), signal.SIGTERM)
    _await_end(children, strays.values(), grace_s)
    for child in children:
        strays |= {p.pid: p for p in child.descendants()}
    _signal_all(children, strays.values(), signal.SIGKILL)
    _await_end(children, strays.values(), 1.0)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child._popen.wait(timeout=0.5)


def _signal_all(children: Sequence[Child], strays: Iterable[psutil.Process], signum: int) -> None:
    for child in children:
        child.signal_group(signum)
    for stray in strays:
        with contextlib.suppress(psutil.Error):
            stray.send_signal(signum)  # checks the creation time first


def _await_end(children: Sequence[Child], strays: Iterable[psutil.Process], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if all(child.exited() for child in children) and not any(_alive(p) for p in strays):
            return
        time.sleep(0.02)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class MemorySampler:
    """Each second: memory, in bytes, and descriptors of this process and all its descendants. Also remembers who was
    seen and lives.

    PSS (shared pages counted once, in parts); RSS where the system has no PSS (`kind` says which). For a PSS the kernel
    walks over every page: it is asked for one when the RSS of something has grown, and every `PSS_S` seconds.
    """

    def __init__(self, interval_s: float = 1.0):
        self.peak_bytes = 0
        self._rss: dict[str, int] = {}
        """Largest so far, by name."""
        self._walked = -math.inf
        self.peak_by_name: dict[str, int] = {}
        self.latest: dict[str, tuple[int, int]] = {}
        """Child name -> its memory when a PSS was last asked for, and its open descriptors in the latest sample."""
        self.kind = "pss"
        self._names: Callable[[], dict[int, str]] = dict
        self._seen: dict[int, psutil.Process] = {}
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self, names: Callable[[], dict[int, str]]) -> None:
        """`names`: pid -> child name, asked at every sample. Once it runs, another start changes nothing."""
        if self._thread.ident is None:
            self._names = names
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def seen(self) -> list[psutil.Process]:
        """Every descendant of this process that a sample met and that may still live."""
        with self._lock:
            return list(self._seen.values())

    def sample(self) -> int | None:
        """Take one sample; returns its total in bytes, None when no PSS was asked for. A child's figure includes what
        it started itself."""
        ours = self._ours()
        with self._lock:
            met = {process.pid: process for process, name in ours if name != "supervisor"}
            self._seen = {pid: p for pid, p in self._seen.items() if pid in met or _alive(p)} | met
        rss = _by_name(ours, lambda process: process.memory_info().rss)
        files = _by_name(ours, _descriptors)
        grown = any(used > GROWTH * self._rss.get(name, 0) for name, used in rss.items())
        if not grown and time.monotonic() - self._walked < PSS_S:
            with self._lock:
                kept = self.latest
                self.latest = {name: (kept[name][0], count) for name, count in files.items() if name in kept}
            return None
        self._walked = time.monotonic()
        self._rss |= {name: max(used, self._rss.get(name, 0)) for name, used in rss.items()}
        by_name = _by_name(ours, self._memory)
        total = sum(by_name.values())
        with self._lock:
            self.latest = {name: (used, files.get(name, 0)) for name, used in by_name.items()}
            self.peak_bytes = max(self.peak_bytes, total)
            for name, used in by_name.items():
                self.peak_by_name[name] = max(self.peak_by_name.get(name, 0), used)
        return total

    def _ours(self) -> list[tuple[psutil.Process, str]]:
        """This process and every descendant, each with the name of the child that it belongs to."""
        me, names = psutil.Process(), self._names()
        found, owner = [(me, "supervisor")], {me.pid: "supervisor"}
        for process in me.children(recursive=True):  # parents come before their children
            with contextlib.suppress(psutil.Error):
                owner[process.pid] = names.get(process.pid) or owner.get(process.ppid(), "supervisor")
                found.append((process, owner[process.pid]))
        return found

    def _memory(self, process: psutil.Process) -> int:
        if self.kind == "pss":
            full = process.memory_full_info()
            if hasattr(full, "pss"):
                return int(full.pss)
            self.kind = "rss"
        return int(process.memory_info().rss)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            with contextlib.suppress(psutil.Error):
                self.sample()


def _descriptors(process: psutil.Process) -> int:
    """Open file descriptors; 0 of a process that is gone."""
    try:
        return int(process.num_fds())
    except (psutil.Error, AttributeError):  # psutil counts none on Windows
        return 0


def _by_name(processes: Iterable[tuple[psutil.Process, str]], used: Callable[[psutil.Process], int]) -> dict[str, int]:
    """Sums over the processes that still live."""
    sums: dict[str, int] = {}
    for process, name in processes:
        with contextlib.suppress(psutil.Error):
            sums[name] = sums.get(name, 0) + used(process)
    return sums
