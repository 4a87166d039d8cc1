"""Children on this machine: started in their own session, watched without reaping, stopped with all their descendants.

Only processes that we started, and what they started, are ever signalled: by id, verified by creation time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

GRACE_S = 2.0
"""Between TERM and KILL. With the hub's last second and the summary it keeps a stop under five seconds."""
_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess)


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


class Child:
    """One running process and the session it leads."""

    def __init__(self, spec: ChildSpec):
        self.name, self.log = spec.name, spec.log
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **spec.env}
        with spec.log.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(
                spec.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True,
                pass_fds=spec.inherit,
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
    """`exit code 3`, or `signal 9 (SIGKILL)`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
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

    PSS (shared pages counted once, in parts); RSS where the system has no PSS (`kind` says which).
    """

    def __init__(self, interval_s: float = 1.0):
        self.peak_bytes = 0
        self.peak_by_name: dict[str, int] = {}
        self.latest: dict[str, tuple[int, int]] = {}
        """Child name -> its memory, and its open descriptors, in the latest sample."""
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

    def sample(self) -> int:
        """Take one sample; returns its total in bytes. A child's figure includes what it started itself."""
        me = psutil.Process()
        names = self._names()
        owner = {me.pid: "supervisor"}
        by_name: dict[str, int] = {"supervisor": self._memory(me)}
        files: dict[str, int] = {"supervisor": _descriptors(me)}
        ours: dict[int, psutil.Process] = {}
        for process in me.children(recursive=True):  # parents come before their children
            with contextlib.suppress(psutil.Error):
                name = names.get(process.pid) or owner.get(process.ppid(), "supervisor")
                owner[process.pid] = name
                by_name[name] = by_name.get(name, 0) + self._memory(process)
                files[name] = files.get(name, 0) + _descriptors(process)
                if name != "supervisor":
                    ours[process.pid] = process
        total = sum(by_name.values())
        with self._lock:
            self._seen = {pid: p for pid, p in self._seen.items() if pid in ours or _alive(p)} | ours
            self.latest = {name: (used, files[name]) for name, used in by_name.items()}
            self.peak_bytes = max(self.peak_bytes, total)
            for name, used in by_name.items():
                self.peak_by_name[name] = max(self.peak_by_name.get(name, 0), used)
        return total

    def _memory(self, process: psutil.Process) -> int:
        try:
            if self.kind == "pss":
                full = process.memory_full_info()
                if hasattr(full, "pss"):
                    return int(full.pss)
                self.kind = "rss"
            return int(process.memory_info().rss)
        except psutil.Error:
            return 0

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
