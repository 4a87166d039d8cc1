"""Processes forked from one that has imported what they need: the same processes as those that start by themselves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import configs
import psutil
import pytest
from children import children, kill

from astracli.config import recipe_io
from astracli.launch import forks, run
from astracli.launch.forks import Forks
from astracli.launch.launcher import Process
from astracli.launch.local import LocalLauncher, process_env
from astracli.plan.types import ProcessPlan
from astracli.process.children import Child, ChildSpec, environment
from astracli.process.config import Role
from astracli.process.forking import Forked, ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

REPORT = """
    import json, os, signal, sys
    print(json.dumps({
        "argv": sys.argv, "env": dict(os.environ), "folder": os.getcwd(), "path": sys.path[0], "name": __name__,
        "leads": os.getsid(0) == os.getpid(), "parent": os.getppid(), "stdin": os.readlink("/proc/self/fd/0"),
        "open": sorted(os.listdir("/proc/self/fd")), "term": str(signal.getsignal(signal.SIGTERM)),
        "int": str(signal.getsignal(signal.SIGINT)), "pipe": str(signal.getsignal(signal.SIGPIPE)),
        "fileinput": "fileinput" in sys.modules,
    }))
    print("to stderr", file=sys.stderr)
    sys.exit(7)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory from which modules are imported; nothing is left running."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    yield tmp_path
    left = [p for p in children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"


@pytest.fixture
def server(home: Path) -> Iterator[ForkServer]:
    found = ForkServer(["fileinput"], environment({}))
    wait_for(found.ready)
    yield found
    found.close()


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.02)


def locked(descriptor: int) -> bool:
    """Whether this process has the lock of a file now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def spec(home: Path, module: str, code: str, *arguments: str, **more: Any) -> ChildSpec:
    (home / f"{module}.py").write_text(textwrap.dedent(code))
    return ChildSpec(module, (sys.executable, "-m", module, *arguments), home / f"{module}.log", **more)


def forked(server: ForkServer, wanted: ChildSpec) -> Child:
    def fork(spec: ChildSpec, out: int) -> Forked | None:
        return server.fork(spec.argv[2], spec.argv[3:], spec.environment(), out, spec.inherit)

    return Child(wanted, fork)


def test_a_forked_process_is_the_one_that_would_have_started(home: Path, server: ForkServer) -> None:
    held = os.open(home / "held", os.O_RDWR | os.O_CREAT)
    wanted = spec(home, "report", REPORT, "a b", "ü", env={"OMP_NUM_THREADS": "3", "RANK": "1"}, inherit=(held,))
    told = []
    for start in (Child, partial(forked, server)):
        child = start(wanted)
        assert child.exit_code() == 7
        lines = child.last_lines()
        assert lines[1] == "to stderr" and len(lines) == 2
        told.append(json.loads(lines[0]))
    alone, copy = told
    assert (alone.pop("fileinput"), copy.pop("fileinput")) == (False, True), "one of them was forked"
    assert len(alone.pop("open")) == len(copy.pop("open")), "no descriptor of the server's stays open"
    assert alone == copy
    assert copy["parent"] == os.getpid() and copy["leads"] and copy["env"]["OMP_NUM_THREADS"] == "3"
    os.close(held)


def test_how_it_ends_and_what_ps_shows_of_it(home: Path, server: ForkServer) -> None:
    code = "import os, sys, time, pathlib\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(600)"
    child = forked(server, spec(home, "sleeper", code, str(home / "there"), nice=7))
    wait_for((home / "there").exists)
    process = psutil.Process(child.pid)
    assert [word for word in process.cmdline() if word] == [sys.executable, "-m", "sleeper", str(home / "there")]
    assert process.ppid() == os.getpid() and process.nice() == 7
    assert not child.exited()
    os.kill(child.pid, signal.SIGKILL)
    wait_for(child.exited)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "its id is its own until it is reaped"
    assert child.exit_code() == -9


def test_the_lock_that_it_inherits_lasts_as_long_as_it_does(home: Path, server: ForkServer) -> None:
    held = os.open(home / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    child = forked(server, spec(home, "holder", "import time\ntime.sleep(600)", inherit=(held,)))
    os.close(held)
    again = os.open(home / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child.pid, signal.SIGKILL)
    assert child.exit_code() == -9
    wait_for(lambda: locked(again))  # nor does the server hold it
    os.close(again)


def test_a_process_that_nobody_adopts_does_not_begin(
    home: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(self: Forked) -> int | None:
        raise ChildProcessError

    monkeypatch.setattr(Forked, "poll", strange)
    before = children() - {psutil.Process(server.pid)}
    wanted = spec(home, "begun", "import pathlib\npathlib.Path('begun').touch()")
    with wanted.log.open("ab") as log:
        assert server.fork("begun", [], wanted.environment(), log.fileno()) is None
    assert server.problem is not None and "orphans" in server.problem
    orphan = next(child for child in children() - before if child.pid != server.pid)
    assert os.waitpid(orphan.pid, 0)[1] != 0 and not (home / "begun").exists()


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "1 threads"),
        ("raise ImportError('libnothing.so is missing')", "it ended with exit code 1: ImportError: libnothing.so"),
    ],
)
def test_what_cannot_be_forked_is_not(home: Path, code: str, problem: str) -> None:
    (home / "preloaded.py").write_text(code)
    server = ForkServer(["preloaded"], environment({}))
    wait_for(lambda: server.ready() or server.problem)
    assert not server.ready() and server.problem is not None and problem in server.problem
    server.close()


def test_only_what_is_read_late_may_differ(home: Path) -> None:
    server = ForkServer(["fileinput"], environment({}))
    assert server.fits(environment({"RANK": "3", "OMP_NUM_THREADS": "8"}))
    assert not server.fits(environment({"CUDA_VISIBLE_DEVICES": "0"}))
    assert not server.fits({name: value for name, value in environment({}).items() if name != "PYTHONPATH"})
    server.close()


# -- a run's processes


@pytest.fixture
def launch(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], LocalLauncher]]:
    """Makes a launcher whose rollout workers are forked, from a server that has imported little."""
    (home / "stand_in.py").write_text("import time\nprint('began', flush=True)\ntime.sleep(600)")
    monkeypatch.setattr(forks, "COMMON", ("fileinput",))
    monkeypatch.setattr(forks, "PRELOAD", {role: ("json",) for role in Role})
    monkeypatch.setattr(forks, "MODULES", {role: "stand_in" for role in Role})
    recipe, made = recipe_io.load("qwen3.5-tiny-m2po-delta"), []

    def launch() -> LocalLauncher:
        found = Forks([plan("rollout")], recipe, lambda process: process_env(process, recipe.launch.host))
        made.append(LocalLauncher(sample_s=0.05, forks=found))
        wait_for(made[-1].ready)
        return made[-1]

    yield launch
    for launcher in made:
        launcher.close()


def plan(name: str) -> ProcessPlan:
    return ProcessPlan(name, Role.ROLLOUT, "stand_in", gpus=(), threads=1, nice=0, restarts=0, env={})


def started(launcher: LocalLauncher, home: Path, name: str) -> Child:
    child = launcher.start(Process(plan(name), configs.rollout(name=name, run_dir=home)))
    wait_for(lambda: "began" in child.last_lines())
    return child


def fork_server() -> psutil.Process:
    running = [child for child in children() if child.status() != psutil.STATUS_ZOMBIE]
    return next(child for child in running if "astracli.process.fork_server" in child.cmdline())


def test_a_dead_fork_server_takes_nobody_with_it_and_is_started_again(
    launch: Callable[[], LocalLauncher], home: Path
) -> None:
    launcher = launch()
    first = started(launcher, home, "rollout")
    kill(fork_server())
    second = started(launcher, home, "rollout2")
    assert not first.exited() and first.last_lines() == ["began"]
    assert second.last_lines()[0].startswith(
        "warning: this process imports everything itself; the fork server: it ended with signal 9 (SIGKILL"
    )
    wait_for(launcher.ready)
    third = started(launcher, home, "rollout3")
    assert third.last_lines() == ["began"], "forked by the next server"
    launcher.stop([first, second, third], grace_s=5.0)
    assert [child.exit_code() for child in (first, second, third)] == [-15] * 3


def test_stopping_everything_leaves_the_server_for_the_next_start(
    launch: Callable[[], LocalLauncher], home: Path
) -> None:
    launcher = launch()
    before = fork_server()
    first = started(launcher, home, "rollout")
    wait_for(lambda: "fork_server" in launcher.memory()["peak_bytes_by_process"])
    launcher.stop_all()
    assert first.exit_code() == -15 and fork_server() == before
    second = started(launcher, home, "rollout")
    launcher.close()
    assert second.exit_code() == -15 and not before.is_running()


def test_what_has_a_gpu_or_an_interpreter_of_its_own_or_another_module_starts_by_itself() -> None:
    recipe = recipe_io.load("qwen3.5-tiny-m2po-delta")
    planned = run.planned(recipe, "train").processes
    assert {process.name for process in planned if forks.preloads(process, recipe)} == {
        "engine0", "rollout", "trainer", "eval"
    }  # fmt: skip
    for process in planned:
        for change in ({"gpus": (0,)}, {"python": "/opt/python"}, {"module": "elsewhere"}):
            assert forks.preloads(replace(process, **change), recipe) == ()
