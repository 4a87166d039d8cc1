"""Calls of tools, as an environment makes them: awaited, each under its limits, in a sandbox that is started when it is
needed and again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astracli.config.recipe_env import EnvTable
from astracli.envs import time_limit
from astracli.envs.tools.host import RESULT_BYTES
from astracli.errors import RunFailed, UserError
from astracli.process.sandbox import Limits, Sandbox

START_S = 120.0
"""For the modules of the tools to be imported."""
PATIENCE_S = 15.0
"""For the sandbox to answer a call whose time is up; then all of it is killed."""
FILE_BYTES = 64 << 20
"""The largest file that a call may write."""
_LINE_BYTES = 8 * RESULT_BYTES
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")


@dataclass(frozen=True)
class Result:
    text: str
    failed: bool = False
    """`text` says why."""


class ToolCalls:
    """Runs functions in a sandbox of its own. For the event loop that calls it first; another loop gets a new one."""

    def __init__(self, specs: Sequence[str], table: EnvTable):
        self._specs, self._table = list(specs), table
        self._most = table.tool_concurrency or 4 * (os.cpu_count() or 1)
        self._box: _Box | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, spec: str, arguments: Mapping[str, Any]) -> Result:
        """The result of a function. Raises RunFailed when no sandbox can be started."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self.close()
            self._loop, self._running, self._starting = loop, asyncio.Semaphore(self._most), asyncio.Lock()
        with time_limit.paused():
            async with self._running:
                box = await self._started()
                try:
                    async with asyncio.timeout(self._table.tool_timeout_s + PATIENCE_S):
                        return await box.call(spec, arguments, self._table)
                except TimeoutError:
                    box.lost()
                    return Result("the tool was ended: it did not answer", failed=True)

    def check(self) -> None:
        """Start a sandbox and end it again. Raises UserError when that cannot be done."""

        async def start() -> None:
            box = _Box(self._table)
            try:
                await box.start(self._specs)
            finally:
                box.lost()

        try:
            asyncio.run(start())
        except RunFailed as error:
            most = self._table.tool_memory_gib
            raise UserError(error.message, f"its limit of memory is env.tool_memory_gib = {most:g}") from None

    @property
    def pid(self) -> int | None:
        """Of the sandbox's guard, which all processes of the tools descend from; None while there is no sandbox."""
        return self._box.pid if self._box is not None and self._box.alive else None

    def close(self) -> None:
        """Kill the sandbox."""
        if self._box is not None:
            self._box.lost()
            self._box = None

    async def _started(self) -> _Box:
        async with self._starting:
            if self._box is None or not self._box.alive:
                self._box = _Box(self._table)
                await self._box.start(self._specs)
            return self._box


class _Box:
    """One sandbox with the process of `host` in it."""

    def __init__(self, table: EnvTable):
        self._folder = tempfile.mkdtemp(prefix="astra-tools-")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        with theirs:
            self._sandbox = Sandbox(
                [sys.executable, "-P", "-m", "astracli.envs.tools.host", str(theirs.fileno())],
                limits=Limits(memory_bytes=int(table.tool_memory_gib * (1 << 30)), file_bytes=FILE_BYTES),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a tool may print
                env=environment() | {"TMPDIR": self._folder},
            )
        self.alive, self.pid = True, self._sandbox.process.pid
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)

    async def start(self, specs: Sequence[str]) -> None:
        """Raises RunFailed."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=_LINE_BYTES)
        self._send({"specs": list(specs), "path": sys.path})
        try:
            async with asyncio.timeout(START_S):
                answer = json.loads(await self._reader.readline() or b'{"refused": "its process ended"}')
        except TimeoutError:
            answer = {"refused": f"it was not ready in {START_S:g} s"}
        except OSError:
            answer = {"refused": "its process ended"}
        if "refused" in answer:
            self.lost()
            raise RunFailed(f"the process of the tools {', '.join(specs)} did not start: {answer['refused']}")
        self._listening = asyncio.create_task(self._listen())

    async def call(self, spec: str, arguments: Mapping[str, Any], table: EnvTable) -> Result:
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        limits = {"time_s": table.tool_timeout_s, "processes": table.tool_processes}
        self._send({"id": number, "spec": spec, "arguments": dict(arguments), **limits})
        try:
            answer = await future
        finally:
            self._waiting.pop(number, None)
        return Result(answer["text"]) if "text" in answer else Result(str(answer["error"]), failed=True)

    def lost(self) -> None:
        """Kill all of it; what is waited for fails."""
        if not self.alive:
            return
        self.alive = False
        self._sandbox.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        for future in self._waiting.values():
            if not future.done() and not future.get_loop().is_closed():
                future.set_result({"error": "the process of the tools ended; call again"})
        with contextlib.suppress(AttributeError, RuntimeError):  # not connected yet; its loop is closed
            self._listening.cancel()
            self._writer.close()
        self._socket.close()

    def _send(self, document: Mapping[str, Any]) -> None:
        self._writer.write(json.dumps(document).encode() + b"\n")

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                answer = json.loads(line)
                future = self._waiting.get(answer["id"])
                if future is not None and not future.done():
                    future.set_result(answer)
        self.lost()


def environment() -> dict[str, str]:
    """This process's own, without what is meant to be known to few."""
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRET)}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
