"""The sandbox: nothing that a command starts outlives it, and every limit ends it."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from astracli.process.channel import readable
from astracli.process.sandbox import Ending, Limits, Sandbox, run

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="adoption of orphans is Linux's")
PYTHON = [sys.executable, "-I", "-S", "-c"]
DAEMONS = """
import os, sys, time
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.getpid()}\\n")
            os.closerange(0, 64)
            time.sleep(600)
        os._exit(0)
for _ in range(3):
    daemon()
while len(open(sys.argv[1]).readlines()) < 3:
    time.sleep(0.01)
print("started", flush=True)
"""
"""Three daemons, each forked twice into a session of its own; their ids go to a file."""


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


@needs_linux
def test_daemons_end_with_the_command_and_with_a_kill(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    done = run([*PYTHON, DAEMONS, str(tmp_path / "a")], limits=Limits(time_s=60))
    assert done.ok and done.stdout == b"started\n"
    assert len(ids(tmp_path / "a")) == 3 and not any(map(alive, ids(tmp_path / "a")))
    (tmp_path / "b").touch()
    box = Sandbox([*PYTHON, DAEMONS + "time.sleep(600)", str(tmp_path / "b")], stdout=subprocess.PIPE)
    assert box.process.stdout is not None and box.process.stdout.readline() == b"started\n"
    command = box.pid()
    assert all(map(alive, [command, *ids(tmp_path / "b")]))
    assert box.kill() == Ending("killed")
    assert not any(map(alive, [command, *ids(tmp_path / "b")]))
    assert box.kill() == box.wait(0.0) == Ending("killed")
    box.process.stdout.close()


@needs_linux
def test_daemons_end_when_the_owner_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").touch()
    owner = (
        "import os, sys; from astracli.process.sandbox import *\n"
        "box = Sandbox([*sys.argv[1:]], stdout=subprocess.PIPE)\n"
        "box.process.stdout.readline(); os.kill(os.getpid(), 9)"
    )
    command = [*PYTHON, DAEMONS + "time.sleep(600)", str(tmp_path / "pids")]
    subprocess.run([sys.executable, "-c", owner, *command], check=False)
    assert len(ids(tmp_path / "pids")) == 3
    assert eventually(lambda: not any(map(alive, ids(tmp_path / "pids"))))


@needs_linux
def test_a_guard_that_is_stopped_or_killed_does_not_keep_its_command() -> None:
    box = Sandbox(["sleep", "600"])
    command = box.pid()
    box.process.send_signal(19)
    assert box.kill() == Ending("killed") and not alive(command)
    box = Sandbox(["sleep", "600"])
    command = box.pid()
    box.process.kill()
    assert box.wait(60) == Ending("lost")
    assert eventually(lambda: not alive(command))


def test_how_a_command_ends() -> None:
    assert run([*PYTHON, "raise SystemExit(7)"], limits=Limits(time_s=60)).ending == Ending("exited", 7)
    died = run([*PYTHON, "import os; os.kill(os.getpid(), 11)"], limits=Limits(time_s=60)).ending
    assert died == Ending("signal", -11) and str(died) == "killed by SIGSEGV"
    assert str(Ending("exited", 7)) == "exit code 7"
    absent = run(["/nowhere/at/all"], limits=Limits(time_s=60))
    assert absent.ending == Ending("exited", 127) and b"cannot start `/nowhere/at/all`" in absent.stderr
    with pytest.raises(ValueError, match="time_s"):
        run(["true"], limits=Limits())


def test_input_and_output_pass_through_whole() -> None:
    text = b"line\n" * 40_000
    done = run(
        [*PYTHON, "import sys; sys.stdout.write(sys.stdin.read()); sys.stderr.write('e')"],
        limits=Limits(time_s=60),
        stdin=text,
        env={"ONLY": "this"},
    )
    assert done.ok and done.stdout == text and done.stderr == b"e"
    silent = run(
        [*PYTHON, "import os; os.close(0); print(sorted(os.environ))"], limits=Limits(time_s=60), stdin=text, env={}
    )
    assert silent.ok and silent.stdout in (b"[]\n", b"['LC_CTYPE']\n")


@pytest.mark.parametrize(
    "code, limits, reason, said",
    [
        ("import time; time.sleep(600)", Limits(time_s=0.3), "time", b""),
        ("print('x' * 3_000_000)", Limits(time_s=60), "output", b""),
        ("import time, os\nwhile True: os.fork(); time.sleep(0.01)", Limits(time_s=60, processes=20), "processes", b""),
        ("b = bytearray(1 << 30)", Limits(time_s=60, memory_bytes=500 << 20), "exited", b"MemoryError"),
        (
            "open('f', 'wb').write(b'x' * 2_000_000)",
            Limits(time_s=60, file_bytes=1_000_000),
            "exited",
            b"File too large",
        ),
        (
            "[open('/dev/null') for _ in range(99)]\n",
            Limits(time_s=60, open_files=20),
            "exited",
            b"Too many open files",
        ),
    ],
)
def test_a_limit_ends_it(code: str, limits: Limits, reason: str, said: bytes, tmp_path: Path) -> None:
    done = run([*PYTHON, code], limits=limits, cwd=tmp_path)
    assert done.ending.reason == reason and said in done.stderr
    if reason == "exited":
        assert done.ending.code == 1
    assert not done.ok


def test_an_owner_may_hold_more_than_1024_descriptors() -> None:
    """`select.select` takes none over 1023; an evaluation with 1,024 requests under way holds more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        found = run([*PYTHON, "print(1)"], limits=Limits(time_s=30))
        assert max(held) > 1024 and found.ok and found.stdout == b"1\n"
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert ours.fileno() > 1023 and not readable(ours)
            theirs.send(b"x")
            assert readable(ours, 30.0)
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_leaves_no_descriptor_and_no_child() -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        assert run(["true"], limits=Limits(time_s=60)).ok
        Sandbox(["sleep", "600"]).kill()
    assert len(os.listdir("/dev/fd")) == before
