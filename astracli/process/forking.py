"""The fork server as its parent sees it: start it, ask it for children, adopt them. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from astracli.process import channel
from astracli.process.children import exit_words, last_lines
from astracli.process.fork_server import TITLE_BYTES
from astracli.process.worker import THREAD_VARIABLES

MODULE = "astracli.process.fork_server"
ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY")
LATE = frozenset((*RANKS, *INTERFACES, *THREAD_VARIABLES))
"""Variables that a child may have for itself: nothing reads them at import, or `worker.set_threads` sets them again in
the libraries that did."""
REPLY_S = 20.0
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


class Forked:
    """A child that was forked for this process; the part of `subprocess.Popen` that `children.Child` uses."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.0005
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return code


def start(modules: Sequence[str], env: Mapping[str, str], link: int, said: int) -> subprocess.Popen[bytes] | Forked:
    """The server's process. `link`: descriptor of its end of the socket; `said`: of the file for what it prints."""
    words = [sys.executable, "-P", "-m", MODULE, str(link), ",".join(modules), "-" * TITLE_BYTES]
    return subprocess.Popen(
        words, pass_fds=[link], env=dict(env), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        start_new_session=True,
    )  # fmt: skip


class ForkServer:
    """A child that imports `modules` once and then forks processes that need them.

    `env`: the environment in which it imports. A process whose environment is another one, apart from `LATE`, cannot be
    forked from it.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]):
        self.problem: str | None = None
        """Why it forks nothing any more."""
        self._ready = False
        self._fixed = _fixed(env)
        self._said = os.memfd_create("fork_server")
        self._link, theirs = socket.socketpair()
        with theirs:
            self._popen = start(modules, {**env, **ONE_THREAD}, theirs.fileno(), self._said)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ready(self, wait_s: float = 0.0) -> bool:
        """It forks when asked to. Waits up to `wait_s` for that."""
        if not self._ready and self.problem is None and channel.readable(self._link, wait_s):
            self._answer(1.0)
            self._ready = self.problem is None
        return self._ready and self.problem is None

    def fits(self, env: Mapping[str, str]) -> bool:
        """A process with this environment may be forked from it."""
        return _fixed(env) == self._fixed

    def fork(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], out: int, inherit: Sequence[int] = ()
    ) -> Forked | None:
        """`python -m module arguments` as a child of this process, in its own session, its stdout and stderr in the
        open file `out`; None when it could not be: `problem` says why."""
        if not self.ready():
            return None
        doc = {"module": module, "arguments": list(arguments), "env": dict(env), "folder": os.getcwd()}
        waits, go = os.pipe()
        with open(waits, "rb") as begin, open(go, "wb", buffering=0) as allow:
            with adopting():
                pid = self._ask(doc, begin.fileno(), out, *inherit)
            if pid is None:
                return None
            child = Forked(pid)
            try:
                child.poll()
            except ChildProcessError:
                self.problem = "this system does not give orphans to a process that asks for them"
                return None
            allow.write(b"1")
        return child

    def close(self) -> None:
        """End it; its children live on."""
        self._link.close()
        self._end()
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _end(self) -> None:
        if self._popen.poll() is None:
            os.kill(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def _ask(self, doc: dict[str, Any], *handles: int) -> int | None:
        try:
            channel.send(self._link, doc, *handles)
        except OSError:
            self._broken()
            return None
        return self._answer(REPLY_S)

    def _answer(self, timeout_s: float) -> int | None:
        """The process id in its next answer; None when it has none, or does not come."""
        if not channel.readable(self._link, timeout_s):
            self.problem = f"it did not answer for {timeout_s:g} s"
            return None
        try:
            doc, _ = channel.receive(self._link)
        except OSError:
            self._broken()
            return None
        self.problem = doc.get("problem")
        return doc.get("pid")

    def _broken(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its socket closes before it has ended
            self._popen.wait(2.0)
        self._end()
        ended = f"it ended with {exit_words(self._popen.wait())}"
        with open(os.dup(self._said), "rb") as said:
            said.seek(0)
            self.problem = ": ".join([ended, *last_lines(said, 1)])


def _fixed(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in LATE}


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Inside it, an orphan among this process's descendants becomes a child of this process."""
    libc = ctypes.CDLL(None)
    before = ctypes.c_int(0)
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
