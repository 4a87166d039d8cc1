"""The supervisor with real children: scripts that sleep, crash, hang, ignore TERM and have children of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from family import DEAF, FAMILY, SLEEP, FakeHub, alive, child_spec, log, process, report, supervisor, wait_for

from astracli.config.recipe_run import LaunchTable
from astracli.errors import RunFailed
from astracli.launch.launcher import Process
from astracli.launch.supervise import Supervisor
from astracli.process import children as local
from astracli.process.children import Child, ChildSpec, MemorySampler, exit_words
from astracli.process.config import Role
from astracli.process.ports import bind, free_ports, held_ports


def test_trainer_done_ends_the_run_and_everyone(logs: Path) -> None:
    hub = FakeHub()
    family = supervisor(
        [process(logs, "rollout", SLEEP), process(logs, "trainer", "import time; time.sleep(0.3)")], hub
    )
    assert not family.run() and hub.stops == 1 and family.children == {}
    assert family.status["trainer"].state == "done"
    assert family.phases()["starting"] >= 0.2


def test_pending_evaluations_are_waited_for(logs: Path) -> None:
    hub = FakeHub()
    hub.pending = 1
    family = supervisor([process(logs, "trainer", ""), process(logs, "eval", SLEEP)], hub)
    threading.Timer(1.0, lambda: setattr(hub, "pending", 0)).start()
    family.run()
    assert family.phases()["finishing"] > 0.4


def test_a_ctrl_c_after_everything_was_done_takes_nothing_back(logs: Path) -> None:
    interrupted = threading.Event()

    def impatient(family: Supervisor) -> None:
        if family.phase == "stopping":
            interrupted.set()

    specs = [process(logs, "rollout", SLEEP), process(logs, "trainer", "")]
    family = supervisor(specs, tick=impatient, interrupted=interrupted)
    assert not family.run() and interrupted.is_set()


def test_first_failure_names_the_child_its_code_and_its_last_lines(logs: Path) -> None:
    code = """
    import sys
    for i in range(30): print("line", i)
    print("error: reward is NaN", file=sys.stderr)
    sys.exit(7)
    """
    hub = FakeHub()
    family = supervisor(
        [process(logs, "trainer", code), process(logs, "rollout", SLEEP)], hub, hint=lambda: "look there"
    )
    with pytest.raises(RunFailed) as failure:
        family.run()
    assert "`trainer` ended with exit code 7" in failure.value.message
    assert "line 29" in failure.value.message and "line 11" in failure.value.message
    assert "line 10" not in failure.value.message and "error: reward is NaN" in failure.value.message
    assert str(log(logs, "trainer")) in failure.value.message
    assert (failure.value.hint, failure.value.exit_code) == ("look there", 1)
    assert hub.released == ["trainer"]


def test_killed_child_is_named_with_its_signal(logs: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RunFailed, match=r"`rollout` ended with signal 9 \(SIGKILL: .*memory\); it wrote nothing"):
        supervisor([process(logs, "rollout", code), process(logs, "trainer", SLEEP)]).run()


def test_clean_exit_before_the_end_is_a_failure(logs: Path) -> None:
    with pytest.raises(RunFailed, match="`rollout` ended with exit code 0 before the run was done"):
        supervisor([process(logs, "rollout", ""), process(logs, "trainer", SLEEP)]).run()


def test_engine_is_restarted_then_gives_up(logs: Path) -> None:
    hub = FakeHub()
    code = "import json; print('out of memory', json.load(open(sys.argv[1]))['await_weights']); sys.exit(1)"
    engine = process(logs, "engine0", code, Role.ENGINE, restarts=2, published=True)
    with pytest.raises(RunFailed, match=r"`engine0` ended with exit code 1 after 2 restarts"):
        supervisor([engine, process(logs, "trainer", SLEEP)], hub).run()
    assert hub.released == ["engine0"] * 3
    assert log(logs, "engine0").read_text().split("out of memory")[1:] == [" False\n", " True\n", " True\n"]


def test_restart_lets_the_run_go_on(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark = logs / "mark"
    code = f"""
    try: open({str(mark)!r}, "x")
    except FileExistsError: time.sleep(60)
    sys.exit("no memory left")
    """
    family = supervisor(
        [process(logs, "rollout", code, restarts=1), process(logs, "trainer", "import time; time.sleep(1)")]
    )
    assert not family.run()
    assert family.status["rollout"].restarts == 1
    said = (
        "warning: `rollout` ended with exit code 1 (no memory left); it is started again, time 1 of 1 within 3600 s\n"
    )
    assert capfd.readouterr().err == said


def test_dead_hub_ends_the_run(logs: Path) -> None:
    hub = FakeHub()
    threading.Timer(0.3, lambda: setattr(hub, "living", False)).start()
    with pytest.raises(RunFailed, match="the hub stopped serving"):
        supervisor([process(logs, "trainer", SLEEP)], hub).run()


def test_readiness_timeout_says_who_and_what_for(logs: Path) -> None:
    family = supervisor(
        [process(logs, "engine0", SLEEP, Role.ENGINE), process(logs, "trainer", SLEEP)], ready_timeout_s=0.6
    )
    family.on_status(report("engine0", "starting", "the model to load"))
    with pytest.raises(RunFailed) as failure:
        family.run()
    assert "not ready after 0.6 s: `engine0` (waiting for the model to load), `trainer` (has not reported yet)" in str(
        failure.value
    )


def test_silent_child_is_given_up_with_its_stacks(logs: Path) -> None:
    code = """
    import faulthandler, signal, time
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    def stuck_in_collective(): time.sleep(60)
    stuck_in_collective()
    """
    family = supervisor([process(logs, "trainer", code)], heartbeat_timeout_s=0.5)
    family.on_status(report("trainer", "ready", "rank 1"))
    with pytest.raises(
        RunFailed, match=r"(?s)no heartbeat for 0.5 s \(last: waiting for rank 1\).*stuck_in_collective"
    ):
        family.run()


def test_the_supervisor_standing_still_blames_nobody(logs: Path) -> None:
    family = supervisor([process(logs, "trainer", "import time; time.sleep(0.5)")], heartbeat_timeout_s=5)
    family.on_status(report("trainer"))
    heard = family.status["trainer"].heard
    assert heard is not None
    family.status["trainer"].heard = heard - 100
    family._looked -= 100
    family.run()
    assert family.status["trainer"].state == "done"


def test_stop_reaches_deaf_children_and_escaped_grandchildren(logs: Path) -> None:
    code = """
    for new_session in (False, True):
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        print(spawn(code, start_new_session=new_session), flush=True)
    time.sleep(60)
    """
    family = Child(child_spec(logs, "family", code))
    deaf = Child(child_spec(logs, "deaf", DEAF))
    wait_for(lambda: len(family.last_lines()) == 2 and deaf.last_lines())
    pids = [int(line) for line in family.last_lines()]
    wait_for(lambda: all(alive(pid) for pid in pids))
    time.sleep(0.3)
    began = time.monotonic()
    local.stop([family, deaf], grace_s=0.5)
    assert (family.exit_code(), deaf.exit_code()) == (-signal.SIGTERM, -signal.SIGKILL)
    assert time.monotonic() - began < 30
    assert not any(alive(pid) for pid in [*pids, family.pid, deaf.pid])


def test_grandchild_that_lost_its_parent_is_stopped_too(logs: Path) -> None:
    middle = FAMILY + f"print(spawn({SLEEP!r}, start_new_session=True), flush=True); time.sleep(0.8)"
    code = f"subprocess.run([sys.executable, '-c', {middle!r}]); time.sleep(60)"
    child = Child(child_spec(logs, "c", code))
    sampler = MemorySampler(0.05)
    sampler.start(lambda: {child.pid: "c"})
    wait_for(lambda: child.last_lines())
    pid = int(child.last_lines()[0])
    wait_for(lambda: alive(pid) and psutil.Process(pid).ppid() != child.pid and len(child.descendants()) == 0)
    sampler.close()
    assert alive(pid)
    local.stop([child], also=sampler.seen(), grace_s=0.5)
    assert not alive(pid)


def test_memory_is_summed_over_the_family_and_named(logs: Path) -> None:
    code = """
        def take():
            x = bytearray(60_000_000)
            x[::4096] = b"1" * len(x[::4096])
            print("full", flush=True)
            return x
        first = take()
        while not os.path.exists(sys.argv[0] + ".more"):
            time.sleep(0.01)
        second = take()
        time.sleep(60)
    """
    (logs / "taker.py").write_text("import os, sys, time\n" + textwrap.dedent(code))
    child = Child(ChildSpec("trainer", (sys.executable, str(logs / "taker.py")), logs / "trainer.log"))
    sampler = MemorySampler(interval_s=600.0)
    sampler.start(lambda: {child.pid: "trainer"})
    wait_for(child.last_lines)
    total = sampler.sample()
    assert 60e6 < sampler.peak_by_name["trainer"] < 120e6
    assert total == sum(sampler.peak_by_name.values()) == sampler.peak_bytes
    assert sampler.sample() is None, "nothing has grown"
    (logs / "taker.py.more").touch()
    wait_for(lambda: len(child.last_lines()) == 2)
    grown = sampler.sample()
    sampler.close()
    local.stop([child])
    assert total is not None and grown is not None and 55e6 < grown - total < 65e6 and sampler.peak_bytes == grown
    assert set(sampler.peak_by_name) == {"trainer", "supervisor"} and sampler.kind == "pss"


INTERRUPTED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_supervise as t
logs = Path({logs!r})
grand = "print(spawn('import time; time.sleep(60)'), flush=True); time.sleep(60)"
specs = [t.process(logs, "rollout", grand), t.process(logs, "trainer", t.DEAF)]
def note(s): (logs / "pids").write_text(" ".join(str(c.pid) for c in s.children.values()))
family = t.supervisor(specs, tick=note)
print("interrupted", family.run(), flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_within_five_seconds(logs: Path, signum: int) -> None:
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), logs=str(logs))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: log(logs, "rollout").exists() and log(logs, "rollout").read_text().strip())
    wait_for(lambda: "deaf" in log(logs, "trainer").read_text())
    # the children may have been quicker
    wait_for(lambda: (logs / "pids").exists() and len((logs / "pids").read_text().split()) == 2)
    pids = [int(p) for p in (logs / "pids").read_text().split()] + [int(log(logs, "rollout").read_text())]
    assert len(pids) == 3 and all(alive(pid) for pid in pids)
    began = time.monotonic()
    os.kill(process.pid, signum)
    stdout, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert stdout == "interrupted True\n"
    assert not any(alive(pid) for pid in pids)


class Elsewhere:
    """A launcher without processes of this machine: each plays its part, a state a look and then its exit code."""

    def __init__(self, parts: dict[str, list[int | None]]):
        self.parts, self.said = parts, list[str]()

    def start(self, process: Process) -> Any:
        self.said.append(f"start {process.name}")
        looks = iter(self.parts[process.name])
        codes: list[int] = []

        def exited() -> bool:
            codes.extend(code for code in [next(looks, None)] if code is not None)
            return bool(codes)

        return SimpleNamespace(
            name=process.name, log=Path("/elsewhere") / process.name, exited=exited, exit_code=lambda: codes[0],
            last_lines=lambda count=20: ["error: no disk"], log_time=lambda: 0.0, print_stacks=lambda: None,
        )  # fmt: skip

    def has(self, host: str | None) -> bool:
        return host is None

    def newcomers(self) -> list[Any]:
        return []

    def hosts(self) -> dict[str, str]:
        return {}

    def gone(self, host: str) -> str:
        return ""

    def ready(self) -> bool:
        return True

    def stop(self, started: Any, grace_s: float) -> None:
        self.said += [f"stop {each.name}" for each in started]

    def stop_all(self) -> None:
        self.said.append("stop all")

    def close(self) -> None:
        self.said.append("close")

    def memory(self) -> dict[str, Any]:
        return {}


def test_the_supervisor_knows_processes_by_the_launchers_contract_alone(logs: Path) -> None:
    processes = [process(logs, "rollout", "", restarts=1), process(logs, "trainer", "")]
    launcher = Elsewhere({"rollout": [None, 1], "trainer": []})
    family = Supervisor(processes, launcher, FakeHub(), main_role=Role.TRAINER, limits=LaunchTable(), poll_s=0.01)  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match="`rollout` ended with exit code 1 after 1 restarts") as failure:
        family.run()
    assert "its last lines in /elsewhere/rollout:\n  error: no disk" in failure.value.message
    again = ["stop rollout", "start rollout", "stop rollout"]
    assert launcher.said == ["start rollout", "start trainer", *again, "close"]


def test_exit_words() -> None:
    assert exit_words(3) == "exit code 3"
    assert exit_words(-15) == "signal 15 (SIGTERM)"
    assert exit_words(-99) == "signal 99"


def test_ports_differ_and_can_be_bound(logs: Path) -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        bind("127.0.0.1", port).close()


@pytest.mark.skipif(sys.platform != "linux", reason="a port that is bound can be bound again on Linux alone")
def test_a_port_is_kept_for_the_process_that_it_was_chosen_for() -> None:
    """Others that ask the system for a port get another, and who names it without SO_REUSEADDR is refused; the process
    itself listens there, also when it is started again."""
    with ExitStack() as held:
        taken = set(held_ports(200, "127.0.0.1", held))
        with ExitStack() as others:
            strangers = [others.enter_context(socket.socket()) for _ in range(400)]
            for each in strangers:
                each.bind(("127.0.0.1", 0))
            strangers += [others.enter_context(bind("127.0.0.1")) for _ in range(400)]
            assert not taken & {each.getsockname()[1] for each in strangers}
            port = min(taken)
            with pytest.raises(OSError), socket.socket() as stranger:
                stranger.bind(("127.0.0.1", port))
            for _ in range(2):
                with bind("127.0.0.1", port) as listener:
                    listener.listen()
                    with socket.create_connection(("127.0.0.1", port)), listener.accept()[0]:
                        pass


def test_a_checkpoint_is_asked_for_and_then_all_end(logs: Path) -> None:
    hub, save = FakeHub(), threading.Event()
    done = logs / "done"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(done)!r}).exists(): time.sleep(0.02)"
    processes = [process(logs, "trainer", wait), process(logs, "eval", SLEEP)]
    hub.pending = 3

    def tick(running: Supervisor) -> None:
        for name in processes:
            running.on_status(report(name.name))
        if running.phase == "running":
            save.set()
        if hub.save_requested:
            done.touch()

    watching = supervisor(processes, hub, tick=tick, save=save)
    assert watching.run() and hub.stops == 1, "what it holds is for later: evaluations are not waited for"
    assert not watching.children and not watching.notes


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(logs: Path) -> None:
    save = threading.Event()
    trainer = process(logs, "trainer", SLEEP)

    def tick(running: Supervisor) -> None:
        running.on_status(report("trainer"))
        if running.phase == "running":
            save.set()

    watching = supervisor([trainer], tick=tick, save=save, save_s=0.2)
    assert watching.run()
    assert watching.notes == ["no checkpoint within 0.2 s: the run goes on from the one before"]
