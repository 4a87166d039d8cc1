"""Python children of the tests, forked from one process that has imported torch and transformers: the suite starts
dozens, and each would spend seconds on that. Where nothing can be forked they start as usual."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import warm_child

from astracli.launch import forks
from astracli.plan.types import ProcessPlan
from astracli.process import forking
from astracli.process.children import ChildSpec
from astracli.process.forking import Forked, ForkServer

HERE = Path(__file__).resolve().parent
PRELOAD = (
    *forks.COMMON, *(name for names in forks.PRELOAD.values() for name in names), "torch.distributed.fsdp", "triton",
    "astracli.engines.embedded.engine", "astracli.engines.embedded.http", "astracli.process.server", "warm_child",
    "transformers.models.qwen3_5.modeling_qwen3_5",
)  # fmt: skip
_servers: list[ForkServer] = []
Child = subprocess.Popen[bytes] | Forked


def server() -> ForkServer | None:
    """Ends with this process. None where nothing can be forked."""
    if sys.platform != "linux":
        return None
    if not _servers or _servers[0].problem is not None:
        _servers[:] = [ForkServer(PRELOAD, {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"})]
        while not _servers[0].ready(wait_s=10.0):
            assert _servers[0].problem is None, _servers[0].problem
    return _servers[0]


def serve_here(*close: int) -> None:
    """The fork server is a fork of this process, which has imported everything and done nothing. `close`: descriptors
    that are none of its business."""
    usual = forking.start
    forking.start = functools.partial(warm_child.fork_server_here, close=close)
    try:
        server()
    finally:
        forking.start = usual


def is_server(pid: int) -> bool:
    return any(server.pid == pid for server in _servers)


def start(
    words: Sequence[str], out: Path, err: Path | None = None, *, env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Child:  # fmt: skip
    """`python WORDS` in a session of its own, stdout and stderr in files; `-c`, `-m` or a script, as Python takes
    them."""
    env, folder, there = dict(os.environ if env is None else env), str(cwd or Path.cwd()), server()
    with out.open("ab") as stdout, (err or out).open("ab") as stderr:
        if there is None:
            return subprocess.Popen(
                [sys.executable, *words], env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        child = there.fork("warm_child", [folder, str(err or out), *words], env, stdout.fileno())
    assert child is not None, there.problem
    return child


def bench_start(
    words: Sequence[str], folder: Path, console: Path, *, env: Mapping[str, str] | None = None, apart: bool = False
) -> Child:
    """In the place of `shared.start` of the benches. A command in front of Python is started as usual."""
    if words[0] == sys.executable:
        return start(words[1:], console, env=env, cwd=folder)
    with console.open("ab") as said:
        return subprocess.Popen(
            words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )


def run(
    words: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([sys.executable, *words], capture_output=True, text=True)`."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        child = start(words, out, err, env=env, cwd=cwd)
        try:
            code = child.wait(timeout)
        finally:
            end(child)
        return subprocess.CompletedProcess([sys.executable, *words], code, out.read_text(), err.read_text())


def end(child: Child) -> None:
    """It, and what it has started in its session."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class WarmForks:
    """In the place of `forks.Forks`: every process of a run is forked from the tests' own server."""

    pid = None

    def ready(self) -> bool:
        return True

    def fork(self, plan: ProcessPlan, spec: ChildSpec, out: int) -> Forked | None:
        there = server()
        if there is None:
            return None
        return there.fork("warm_child", [os.getcwd(), "", *spec.argv[1:]], spec.environment(), out, spec.inherit)

    def close(self) -> None:
        pass
