"""Sandbox: a command that can be killed with everything it started, under limits. For graders, code and tools.

`Sandbox(command)` starts it; `kill` and `wait` end it. `run(command)` starts it, feeds it and returns what it wrote.

What holds, on Linux:
- When the command ends, is killed, passes a limit, or the process that owns the sandbox dies (of SIGKILL too), every
  process that the command started is dead, whatever session it moved to and however often it forked.
- No call waits longer than its limit.
- Memory, file size and open files are limits of each process, the number of processes one of all together.

It bounds accidents, loops and what generated code does without meaning harm. It is no border against an attacker: the
command runs as the same user, sees the file system and the network, and could kill its guard. Elsewhere than on Linux
only the command's process group is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from astracli.process import sandbox_guard

_GUARD = [sys.executable, "-I", "-S", str(Path(sandbox_guard.__file__))]
_PATIENCE_S = sandbox_guard.KILL_S + 2.0
"""For the guard to end once it was told to; then everything is killed from here."""

Reason = Literal["exited", "signal", "time", "processes", "output", "killed", "lost"]


@dataclass(frozen=True)
class Limits:
    """What a command may use. None: no limit."""

    time_s: float | None = None
    """From its start to its end."""
    memory_bytes: int | None = None
    """Address space of a process."""
    file_bytes: int | None = None
    """Size of a file that it writes."""
    open_files: int | None = None
    processes: int | None = None
    """Processes at once, the command's own included; looked at twenty times a second."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    reason: Reason
    """`lost`: its guard was killed."""
    code: int = 0
    """Exit code of `exited`; of `signal` the number, negative."""

    def __str__(self) -> str:
        if self.reason == "exited":
            return f"exit code {self.code}"
        if self.reason == "signal":
            with suppress(ValueError):
                return f"killed by {signal.Signals(-self.code).name}"
        return {
            "time": "it passed its time limit",
            "processes": "it started too many processes",
            "output": "it wrote too much",
            "killed": "it was killed",
            "signal": f"killed by signal {-self.code}",
            "lost": "it was killed together with its guard",
        }[self.reason]


class Sandbox:
    """A command that runs until it ends or is killed. `kill` and `wait` may be called from any thread, any number of
    times."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        limits: Limits = Limits(),
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ):
        self._lock = threading.Lock()
        self._ending: Ending | None = None
        self._said = b""
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*_GUARD, str(theirs.fileno()), json.dumps(asdict(limits)), *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[theirs.fileno(), *pass_fds],
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )

    def pid(self, limit_s: float = 10.0) -> int:
        """The command's process id. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._said and not self._listen(deadline):
            if time.monotonic() >= deadline:
                raise TimeoutError("the sandbox has not started its command")
        return int(json.loads(self._said.split(b"\n")[0])["pid"])

    def wait(self, limit_s: float) -> Ending | None:
        """How it ended, once nothing of it is left; None when it still runs after so many seconds."""
        deadline = time.monotonic() + limit_s
        while not self._listen(deadline):
            if time.monotonic() >= deadline:
                return None
        return self._reaped()

    def kill(self) -> Ending:
        """End it with everything it started. -> how it ended, when that was before."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)  # what the guard waits for
        with suppress(ProcessLookupError):
            self._send(signal.SIGCONT)
        ending = self.wait(_PATIENCE_S)
        if ending is None:
            sandbox_guard.kill_below(self.process.pid)
            self._send(signal.SIGKILL)
            ending = self._reaped()
        return ending

    def _send(self, number: signal.Signals) -> None:
        with self._lock:
            if self.process.returncode is None:
                self.process.send_signal(number)

    def _listen(self, deadline: float) -> bool:
        """Read what the guard says. True when it has ended."""
        with self._lock:
            if self._ending is not None:
                return True
            self._control.settimeout(max(0.001, min(0.05, deadline - time.monotonic())))
            try:
                said = self._control.recv(4096)
            except TimeoutError:
                return False
            except OSError:
                return True
            self._said += said
            return not said

    def _reaped(self) -> Ending:
        with self._lock:
            if self._ending is None:
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_PATIENCE_S)
                lines = self._said.decode().splitlines()
                self._ending = Ending(**json.loads(lines[1])) if len(lines) > 1 else Ending("lost")
                self._control.close()
            return self._ending


@dataclass(frozen=True)
class Finished:
    """A command that has ended, and what it wrote."""

    ending: Ending
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        return self.ending == Ending("exited", 0)


def run(
    command: Sequence[str],
    *,
    limits: Limits,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    output_bytes: int = 1 << 20,
) -> Finished:
    """Run a command to its end. It is killed when stdout or stderr passes `output_bytes` (reason `output`).

    `limits.time_s` must be set: nothing else ends a command that waits.
    """
    if limits.time_s is None:
        raise ValueError("a command that is waited for needs limits.time_s")
    box = Sandbox(
        command,
        limits=limits,
        env=env,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    streams = _Streams(box.process, stdin, output_bytes)
    try:
        whole = streams.pump(time.monotonic() + limits.time_s + _PATIENCE_S)
        ending = (box.wait(_PATIENCE_S) if whole else None) or box.kill()
    finally:
        box.kill()
        streams.close()
    return Finished(Ending("output") if streams.too_much else ending, *(bytes(read) for read in streams.read))


class _Streams:
    """The three pipes of a child, moved without ever waiting for one of them alone."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes, most: int):
        assert process.stdin and process.stdout and process.stderr
        self._stdin, self._rest, self._most = process.stdin, memoryview(stdin), most
        self._outputs = (process.stdout, process.stderr)
        self.read = (bytearray(), bytearray())
        self.too_much = False
        for pipe in (self._stdin, *self._outputs):
            os.set_blocking(pipe.fileno(), False)

    def pump(self, deadline: float) -> bool:
        """Until both outputs are closed. False: stopped before, at the deadline or with too much output."""
        with selectors.DefaultSelector() as ready:
            for pipe, read in zip(self._outputs, self.read, strict=True):
                ready.register(pipe, selectors.EVENT_READ, read)
            ready.register(self._stdin, selectors.EVENT_WRITE)
            while any(pipe in {key.fileobj for key in ready.get_map().values()} for pipe in self._outputs):
                if time.monotonic() >= deadline or self.too_much:
                    return False
                for key, _ in ready.select(min(1.0, max(0.0, deadline - time.monotonic()))):
                    if not (self._write() if key.fileobj is self._stdin else self._take(key.fd, key.data)):
                        ready.unregister(key.fileobj)
                        if key.fileobj is self._stdin:
                            self._stdin.close()
        return True

    def _write(self) -> bool:
        try:
            self._rest = self._rest[os.write(self._stdin.fileno(), self._rest[: 1 << 16]) :] if self._rest else b""  # type: ignore[assignment]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self._rest)

    def _take(self, fd: int, read: bytearray) -> bool:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        read += chunk[: self._most - len(read) + 1]
        self.too_much = self.too_much or len(read) > self._most
        return bool(chunk)

    def close(self) -> None:
        for pipe in (self._stdin, *self._outputs):
            with suppress(OSError):
                pipe.close()
