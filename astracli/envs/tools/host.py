"""The process in which tools run: `python -P -m astracli.envs.tools.host FD`, in a sandbox.

It imports the functions once and forks processes for calls, as many as run at once. Such a process has a session and an
empty folder of its own. It serves further calls, until one takes too long, starts too many processes or ends it; then
everything that it started is killed. A function with the attribute `fresh` gets a process for each call. On the socket
FD, lines of JSON:

    {"specs", "path"}                                       first, from the owner; {"ready": true} or {"refused"} back
    {"id", "spec", "arguments", "time_s", "processes"}      a call
    {"id", "text"} or {"id", "error"}                       its result
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from astracli.envs.tools.functions import Tool, named
from astracli.errors import UserError
from astracli.process import sandbox_guard

RESULT_BYTES = 1 << 20
"""The largest result; the tokens of one have a limit of their own."""
COUNT_S = 0.05
"""How often the processes of calls are counted."""
_RESULT = struct.Struct(">?I")
_REQUEST = struct.Struct(">I")


@dataclass
class Worker:
    """A process for calls, as the host sees it."""

    pid: int
    socket: socket.socket
    folder: str
    call: Mapping[str, Any] | None = None
    """What it runs now."""
    ends: float = 0.0
    read: bytearray = field(default_factory=bytearray)

    def give(self, call: Mapping[str, Any]) -> None:
        self.call, self.ends = call, time.monotonic() + call["time_s"]
        data = json.dumps([call["spec"], call["arguments"]]).encode()
        self.socket.setblocking(True)  # it reads at once
        with suppress(OSError):  # it has died: seen by its end
            self.socket.sendall(_REQUEST.pack(len(data)) + data)
        self.socket.setblocking(False)

    def listen(self) -> bool:
        """Read what there is. False: it has ended."""
        with suppress(BlockingIOError, ConnectionResetError):
            while chunk := self.socket.recv(1 << 16):
                self.read += chunk
                if len(self.read) > 2 * RESULT_BYTES:
                    return False
            return False
        return True

    def result(self) -> tuple[bool, str] | None:
        """(whether it is the function's, text); None while it is not there as a whole."""
        if len(self.read) < _RESULT.size:
            return None
        good, length = _RESULT.unpack_from(self.read)
        end = _RESULT.size + length
        if len(self.read) < end:
            return None
        text = self.read[_RESULT.size : end].decode("utf-8", "replace")
        del self.read[:end]
        return good, text


class Host:
    def __init__(self, fd: int):
        self._socket = socket.socket(fileno=fd)
        self._said = bytearray()
        self._workers: dict[int, Worker] = {}
        self._tools: dict[str, Tool] = {}
        self._ready = selectors.DefaultSelector()
        self._open = True
        self._counted = 0.0

    def serve(self) -> None:
        """Until the owner closes the socket."""
        sandbox_guard.prctl(sandbox_guard.PR_SET_CHILD_SUBREAPER, 1)
        self._ready.register(self._socket, selectors.EVENT_READ)
        while self._open:
            now = time.monotonic()
            busy = [worker for worker in self._workers.values() if worker.call is not None]
            waits = [max(0.0, min(COUNT_S, *(worker.ends - now for worker in busy)))] if busy else [None]
            for key, _ in self._ready.select(waits[0]):
                if key.fileobj is self._socket:
                    self._hear()
                elif key.data in self._workers:
                    self._listen(self._workers[key.data])
            self._look()

    def _hear(self) -> None:
        chunk = self._socket.recv(1 << 20)
        self._open = bool(chunk)
        self._said += chunk
        *lines, rest = bytes(self._said).split(b"\n")
        self._said = bytearray(rest)
        for line in lines:
            said = json.loads(line)
            if "specs" in said:
                sys.path += [place for place in said["path"] if place not in sys.path]
                self._import(said["specs"])
            else:
                self._begin(said)

    def _say(self, **said: Any) -> None:
        self._socket.sendall(json.dumps(said).encode() + b"\n")

    def _import(self, specs: list[str]) -> None:
        try:
            self._tools = {spec: named(spec) for spec in specs}
        except UserError as error:
            self._say(refused=str(error.message))
        else:
            self._say(ready=True)

    def _begin(self, call: Mapping[str, Any]) -> None:
        idle = (worker for worker in self._workers.values() if worker.call is None)
        fresh = self._tools[call["spec"]].fresh
        worker = (None if fresh else next(idle, None)) or self._forked()
        worker.give(call)

    def _forked(self) -> Worker:
        folder = tempfile.mkdtemp()
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.chdir(folder)
                for key in list(self._ready.get_map().values()):
                    os.close(key.fd)
                ours.close()
                os.environ.update(TMPDIR=folder, HOME=folder)
                tempfile.tempdir = folder
                _work(self._tools, theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        worker = self._workers[pid] = Worker(pid, ours, folder)
        self._ready.register(ours, selectors.EVENT_READ, pid)
        return worker

    def _listen(self, worker: Worker) -> None:
        alive = worker.listen()
        if worker.call is not None and (found := worker.result()) is not None:
            if alive and not self._tools[worker.call["spec"]].fresh:
                self._answer(worker, *found)
            else:
                self._end(worker, found)
        elif not alive:
            self._end(worker)

    def _look(self) -> None:
        """End calls whose time is up, and those with too many processes."""
        now = time.monotonic()
        busy = [worker for worker in self._workers.values() if worker.call is not None]
        for worker in busy:
            if now >= worker.ends and worker.call is not None:
                self._end(worker, (False, f"it was ended: it took more than {worker.call['time_s']:g} s"))
        if now - self._counted >= COUNT_S:
            self._counted = now
            for worker in busy:
                most = worker.call["processes"] if worker.call is not None else 0
                if most and len(sandbox_guard.descendants(worker.pid)) + 1 > most:
                    self._end(worker, (False, f"it was ended: it had more than {most} processes"))

    def _answer(self, worker: Worker, good: bool, text: str) -> None:
        assert worker.call is not None
        self._say(id=worker.call["id"], **{"text" if good else "error": text[:RESULT_BYTES]})
        worker.call = None

    def _end(self, worker: Worker, result: tuple[bool, str] | None = None) -> None:
        """Kill a worker and all that it left behind, then answer what it runs; None: with how it ended."""
        del self._workers[worker.pid]
        self._ready.unregister(worker.socket)
        worker.socket.close()
        sandbox_guard.kill_below(worker.pid)
        sandbox_guard.send(worker.pid, signal.SIGKILL)
        _, status = os.waitpid(worker.pid, 0)
        for orphan in set(sandbox_guard.children(os.getpid())) - self._workers.keys():
            sandbox_guard.kill_below(orphan)
            sandbox_guard.send(orphan, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)
        shutil.rmtree(worker.folder, ignore_errors=True)
        if worker.call is not None:
            ended = f"its process ended ({_how(os.waitstatus_to_exitcode(status))})"
            self._answer(worker, *(result or (False, ended)))


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _work(tools: Mapping[str, Tool], channel: socket.socket) -> None:
    """In the process of calls: one after the other, until the host closes the channel."""
    with channel, channel.makefile("rb") as requests:
        while head := requests.read(_REQUEST.size):
            (length,) = _REQUEST.unpack(head)
            spec, arguments = json.loads(requests.read(length))
            good, text = _called(tools[spec], arguments)
            data = text.encode("utf-8", "replace")[:RESULT_BYTES]
            channel.sendall(_RESULT.pack(good, len(data)) + data)


def _called(tool: Tool, arguments: Mapping[str, Any]) -> tuple[bool, str]:
    try:
        found = tool.call(arguments)
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
        return True, found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    except MemoryError:
        return False, "MemoryError: it passed its limit of memory"
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}"


def main() -> None:
    Host(int(sys.argv[1])).serve()


if __name__ == "__main__":
    main()
