"""The fault matrix, a seeded row each: two runs in real processes, to which one thing after the other is done
(`bench/faults/` has all of it), malformed inputs, and damage that no run is needed for."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import pytest
import warm
from hub_tools import group as packed_group
from hub_tools import open_store

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import shared
from faults import damage, hosts, malformed, network, strangers
from faults.relay import Relay, Weather
from faults.world import Row, World, phase, victim
from loop.kill_resume import Attempt

from astracli import errors
from astracli.errors import RunFailed, UserError, machine_failed
from astracli.rl.types import unpack_group

SEED = 20261130
pytestmark = pytest.mark.timeout(900)
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are found and limited as on Linux")


def go_on(attempt: Attempt, steps: int = 1) -> bool:
    """Whether so many steps more are trained."""
    goal = len(attempt.steps()) + steps
    return attempt.wait(lambda: len(attempt.steps()) >= goal, 300)


def found(attempt: Attempt, name: str) -> int:
    """The id of a process; a grader that was killed is there again a moment later."""
    attempt.wait(lambda: victim(attempt, name) is not None, 300)
    process = victim(attempt, name)
    assert process is not None, (name, attempt.log.read_text()[-600:])
    return process.pid


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "start", warm.bench_start)
        yield


# ---- a run that outlives them all


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory, forked: None) -> dict[str, Row]:
    """Row by name. One run, through a relay and under a clock that can be set; after each fault it must get on."""
    if sys.platform != "linux":
        pytest.skip("processes are found and limited as on Linux")
    world = World(tmp_path_factory.mktemp("survivor"), SEED)
    relay = Relay(world.folder / "relay", world.draw)
    clock = world.folder / "clock"
    clock.write_text("0")
    env = network.hooked(ASTRA_FAULTS_RELAY=str(relay.folder), ASTRA_FAULTS_CLOCK=str(clock))
    attempt = world.start(world.folder / "run", 100_000, env=env)
    rows: dict[str, Row] = {}
    held: list[socket.socket] = []

    def stopped(name: str, seconds: float) -> None:
        pid = found(attempt, name)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    def weather(seconds: float, **what: float) -> None:
        relay.weather = Weather(**what)  # type: ignore[arg-type]
        if what.get("refuse"):
            relay.cut()  # what is open would go on
        time.sleep(seconds)
        relay.weather = Weather()

    def flood() -> None:
        """Half-open requests without a token."""
        for port in strangers.ports_of(attempt.run) * 150:
            with suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
                held[-1].send(b"POST /lease HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ")

    faults: dict[str, Callable[[], object]] = {
        "supervisor stopped": lambda: stopped("supervisor", 1.5),
        "engine stopped": lambda: stopped("engine0", 0.5),
        "rollout worker stopped": lambda: stopped("rollout", 0.5),
        "trainer stopped": lambda: stopped("trainer", 0.5),
        "grader killed": lambda: os.kill(found(attempt, "grader"), signal.SIGKILL),
        "fork server killed": lambda: os.kill(found(attempt, "fork_server"), signal.SIGKILL),
        "clock a day back": lambda: clock.write_text("-86400"),
        "clock ten years on": lambda: clock.write_text("315360000"),
        "connections cut": relay.cut,
        "slow network": lambda: weather(0.5, delay_s=0.03, bytes_per_s=2e6),
        "network silent": lambda: weather(0.5, hold=True),
        "network refused": lambda: weather(0.5, refuse=True),
        "flood": flood,
    }  # fmt: skip
    try:
        assert attempt.wait(lambda: bool(attempt.steps()), 300), attempt.end()
        for name, make in faults.items():
            row = rows[name] = Row(name, "training")
            make()
            if not go_on(attempt):
                row.problems.append(f"no step after it: {attempt.log.read_text()[-600:]}")
                break
        os.kill(attempt.supervisor.pid, signal.SIGTERM)
        end = rows["end"] = world.judge(Row("end", ""), attempt, (), limit_s=300)
        end.problems += [] if end.outcome == "interrupted" else [end.outcome]
        world.finish(attempt.run, end)
    finally:
        for each in held:
            each.close()
        relay.close()
    return rows


SURVIVED = (
    "supervisor stopped", "engine stopped", "rollout worker stopped", "trainer stopped", "grader killed",
    "fork server killed", "clock a day back", "clock ten years on", "connections cut", "slow network", "network silent",
    "network refused", "flood", "end",
)  # fmt: skip


@linux
@pytest.mark.parametrize("name", SURVIVED)
def test_the_run_gets_on(survivor: dict[str, Row], name: str) -> None:
    """The last row: it is interrupted and resumed to its end with whole books; nothing is left behind."""
    assert survivor[name].problems == []


# ---- a run that is ended again and again


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, forked: None) -> dict[str, Row]:
    """Row by name: attempts of one run, each ended by something else; the last is its end."""
    if sys.platform != "linux":
        pytest.skip("processes are found and limited as on Linux")
    world = World(tmp_path_factory.mktemp("ended"), SEED)
    run, draw = world.folder / "run", Random(SEED)
    rows: dict[str, Row] = {}

    def attempt(name: str, ready: Callable[[Attempt], bool], fault: Callable[[Attempt], object], *causes: str) -> None:
        row, started = Row(name, ""), world.start(run, 5)
        if not started.wait(lambda: ready(started), 300):
            row.problems.append("the fault was not met")
        else:
            fault(started)
        rows[name] = world.judge(row, started, causes, limit_s=300)

    def limit(started: Attempt) -> None:
        resource.prlimit(found(started, "trainer"), resource.RLIMIT_FSIZE, (100_000, 100_000))

    def send(started: Attempt, name: str, number: int) -> None:
        os.kill(found(started, name), number)

    attempt("file sizes", lambda a: len(a.steps()) >= 3, limit, r"`trainer`(.|\n)*limit on file sizes is full")
    attempt(
        "SIGTERM, finishing", lambda a: phase(a) == "finishing", lambda a: send(a, "eval", signal.SIGTERM), r"`eval`"
    )
    for part in ("checkpoint", "weights", "metrics"):
        files = sorted(file for file in run.glob(damage.PARTS[part]) if file.is_file())
        damage.flip(files[-1] if part == "checkpoint" else draw.choice(files), draw)
    attempt("one byte wrong", lambda a: True, lambda a: None)
    rows["one byte wrong"].problems += world.books(run)
    rows["one byte wrong"].said = (run.parent / "run.log").read_text()
    return rows


@linux
def test_causes_are_said_and_the_books_stay_whole(ended: dict[str, Row]) -> None:
    assert {name: row.problems for name, row in ended.items() if row.problems} == {}
    outcomes = {name: row.outcome for name, row in ended.items()}
    assert outcomes == {
        "file sizes": "ended, exit 1",
        "SIGTERM, finishing": "ended, exit 1",
        "one byte wrong": "finished",
    }
    assert "1 checkpoint is damaged" in ended["one byte wrong"].said


# ---- without a run


def test_malformed_inputs(tmp_path: Path) -> None:
    rows = malformed.tried(tmp_path, SEED, 60)
    assert [(row.where, row.problems) for row in rows if row.problems] == []
    assert {"taken", "refused"} <= {row.outcome for row in rows}


def test_one_byte_of_a_group_is_noticed() -> None:
    blob, draw = packed_group(0), Random(SEED)
    unpack_group(blob)
    for _ in range(200):
        wrong = bytearray(blob)
        wrong[draw.randrange(len(wrong))] ^= draw.randrange(1, 256)
        with pytest.raises(ValueError, match="checksum"):
            unpack_group(bytes(wrong))


def test_a_database_that_lost_its_newest_entries_is_refused(tmp_path: Path) -> None:
    """SQLite leaves out what stands behind a damaged entry of its log, without a word."""
    store = open_store(tmp_path)
    with pytest.raises(RunFailed, match=r"knows the batches of 0 steps, the checkpoint has trained 3"):
        store.rewind(3, 3)
    store.close()
    with closing(sqlite3.connect(tmp_path / "hub.sqlite")) as hub:
        hub.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file = next(tmp_path.glob("*.sqlite"))
    data = bytearray(file.read_bytes())
    data[16 << 10 : 17 << 10] = bytes(1 << 10)  # the head of the second page
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|malformed"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(30, "Read-only file system", "x"), "cannot be written any more"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "cannot be written any more"),
        (OSError(28, "No space left on device"), "is full"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("Too many open files"), "ulimit -n"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (MemoryError(), "no more memory"),
        (SyntaxError("invalid syntax", (errors.__file__, 60, 1, "daf x")), "errors.py` line 60: invalid syntax"),
        (ImportError("cannot import name `x`", name="astracli.rl"), "installed astracli is damaged"),
    ],
)
def test_what_the_machine_refuses_is_named(error: Exception, words: str) -> None:
    outer = RuntimeError("deep inside")
    outer.__cause__ = error
    found = machine_failed(outer)
    assert found is not None and found.exit_code == 1 and words in f"{found.message} {found.hint}"
    for other in (ValueError("x"), SyntaxError("x", ("/mine/reward.py", 1, 1, "")), ImportError("x", name="mine")):
        assert machine_failed(other) is None


@linux
def test_an_agent_killed_while_a_group_is_generated_costs_its_leases_alone(tmp_path: Path) -> None:
    """A row of `bench/faults/hosts.py`: another agent takes over, and the books of the run are whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "start", warm.bench_start)
        patch.setattr(hosts, "LEASE_S", 4.0)
        row = hosts.played("group", tmp_path, Random(SEED), steps=10, sets=["eval.every=10", "checkpoint.every=0"])
    assert row["problems"] == "none" and row["leased"], row
