"""The supervisor with real children: scripts that sleep, crash, hang, ignore TERM and have children of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from astracli.errors import RunFailed
from astracli.launch.restarts import Restarts, Resumes, Start
from astracli.launch.supervise import Supervisor
from astracli.process import children as local
from astracli.process import transient
from astracli.process.children import Child, ChildSpec, MemorySampler, exit_words
from astracli.process.ports import bind, free_ports

SLEEP = "import time; time.sleep(60)"
FAMILY = """
import signal, subprocess, sys, time
def spawn(code, **options):
    return subprocess.Popen([sys.executable, "-c", code], **options).pid
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


class FakeHub:
    def __init__(self) -> None:
        self.living = True
        self.stops = 0
        self.released: list[str] = []
        self.pending = 0

    def alive(self) -> bool:
        return self.living

    def request_stop(self) -> None:
        self.stops += 1

    def release_worker(self, name: str) -> None:
        self.released.append(name)

    def pending_evals(self) -> int:
        return self.pending


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    left = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"


def spec(logs: Path, name: str, code: str, role: str | None = None, **more: Any) -> ChildSpec:
    return ChildSpec(
        name, role or name, (sys.executable, "-c", FAMILY + textwrap.dedent(code)), logs / f"{name}.log", **more
    )


def supervisor(specs: list[ChildSpec], hub: FakeHub | None = None, **more: Any) -> Supervisor:
    fields: dict[str, Any] = dict(main_role="trainer", poll_s=0.02, memory=MemorySampler(0.1))
    return Supervisor(specs, hub or FakeHub(), **(fields | more))


def report(name: str, state: str = "ready", waiting: str | None = None, **progress: Any) -> dict[str, Any]:
    return {"name": name, "pid": 1, "state": state, "waiting": waiting, "progress": progress}


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_trainer_done_ends_the_run_and_everyone(logs: Path) -> None:
    hub = FakeHub()
    family = supervisor([spec(logs, "rollout", SLEEP), spec(logs, "trainer", "import time; time.sleep(0.3)")], hub)
    outcome = family.run()
    assert not outcome.interrupted and hub.stops == 1 and family.children == {}
    assert family.status["trainer"].state == "done"
    assert outcome.phases["starting"] >= 0.2


def test_pending_evaluations_are_waited_for(logs: Path) -> None:
    hub = FakeHub()
    hub.pending = 1
    family = supervisor([spec(logs, "trainer", ""), spec(logs, "eval", SLEEP)], hub)
    threading.Timer(1.0, lambda: setattr(hub, "pending", 0)).start()
    outcome = family.run()
    assert outcome.phases["finishing"] > 0.4


def test_a_ctrl_c_after_everything_was_done_takes_nothing_back(logs: Path) -> None:
    interrupted = threading.Event()

    def impatient(family: Supervisor) -> None:
        if family.phase == "stopping":
            interrupted.set()

    specs = [spec(logs, "rollout", SLEEP), spec(logs, "trainer", "")]
    family = supervisor(specs, tick=impatient, interrupted=interrupted)
    assert not family.run().interrupted and interrupted.is_set()


def test_first_failure_names_the_child_its_code_and_its_last_lines(logs: Path) -> None:
    code = """
    import sys
    for i in range(30): print("line", i)
    print("error: reward is NaN", file=sys.stderr)
    sys.exit(7)
    """
    hub = FakeHub()
    family = supervisor([spec(logs, "trainer", code), spec(logs, "rollout", SLEEP)], hub, hint=lambda: "look there")
    with pytest.raises(RunFailed) as failure:
        family.run()
    assert "`trainer` ended with exit code 7" in failure.value.message
    assert "line 29" in failure.value.message and "line 11" in failure.value.message
    assert "line 10" not in failure.value.message and "error: reward is NaN" in failure.value.message
    assert str(logs / "trainer.log") in failure.value.message
    assert (failure.value.hint, failure.value.exit_code) == ("look there", 1)
    assert hub.released == ["trainer"]


def test_killed_child_is_named_with_its_signal(logs: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RunFailed, match=r"`rollout` ended with signal 9 \(SIGKILL\); it wrote nothing"):
        supervisor([spec(logs, "rollout", code), spec(logs, "trainer", SLEEP)]).run()


def test_clean_exit_before_the_end_is_a_failure(logs: Path) -> None:
    with pytest.raises(RunFailed, match="`rollout` ended with exit code 0 before the run was done"):
        supervisor([spec(logs, "rollout", ""), spec(logs, "trainer", SLEEP)]).run()


def test_engine_is_restarted_then_gives_up(logs: Path) -> None:
    hub = FakeHub()
    restarted: list[int] = []
    engine = spec(
        logs,
        "engine0",
        "import sys; print('out of memory'); sys.exit(1)",
        "engine",
        restarts=2,
        before_restart=lambda: restarted.append(1),
    )
    with pytest.raises(RunFailed, match=r"`engine0` ended with exit code 1 after 2 restarts"):
        supervisor([engine, spec(logs, "trainer", SLEEP)], hub).run()
    assert len(restarted) == 2 and hub.released == ["engine0"] * 3
    assert (logs / "engine0.log").read_text().count("out of memory") == 3


def test_restart_lets_the_run_go_on(logs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark = logs / "mark"
    code = f"""
    try: open({str(mark)!r}, "x")
    except FileExistsError: time.sleep(60)
    sys.exit("no memory left")
    """
    family = supervisor([spec(logs, "rollout", code, restarts=1), spec(logs, "trainer", "import time; time.sleep(1)")])
    assert not family.run().interrupted
    assert family.status["rollout"].restarts == 1
    said = (
        "warning: `rollout` ended with exit code 1 (no memory left); it is started again, time 1 of 1 within 3600 s\n"
    )
    assert capfd.readouterr().err == said


def test_dead_hub_ends_the_run(logs: Path) -> None:
    hub = FakeHub()
    threading.Timer(0.3, lambda: setattr(hub, "living", False)).start()
    with pytest.raises(RunFailed, match="the hub stopped serving"):
        supervisor([spec(logs, "trainer", SLEEP)], hub).run()


def test_readiness_timeout_says_who_and_what_for(logs: Path) -> None:
    family = supervisor([spec(logs, "engine0", SLEEP, "engine"), spec(logs, "trainer", SLEEP)], ready_timeout_s=0.6)
    family.on_status(report("engine0", "starting", "the model to load"))
    with pytest.raises(RunFailed) as failure:
        family.run()
    assert "not ready after 0.6 s: `engine0` (waiting for the model to load), `trainer` (has not reported yet)" in str(
        failure.value
    )


def test_ready_needs_health_too(logs: Path) -> None:
    served: list[str] = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.append(self.headers["Authorization"])
            self.send_response(200 if len(served) > 2 else 503)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/health_generate"
    phases: list[tuple[str, int]] = []
    family = supervisor(
        [spec(logs, "engine0", SLEEP, "engine", health_url=url), spec(logs, "trainer", "import time; time.sleep(1)")],
        token="t",
        tick=lambda s: phases.append((s.phase, len(served))),
    )
    family.on_status(report("engine0"))
    family.on_status(report("trainer"))
    family.run()
    server.shutdown()
    server.server_close()
    assert served == ["Bearer t"] * 3
    assert all(count >= 3 for phase, count in phases if phase == "running")
    assert ("running", 3) in phases


def test_silent_child_is_given_up_with_its_stacks(logs: Path) -> None:
    code = """
    import faulthandler, signal, time
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    def stuck_in_collective(): time.sleep(60)
    stuck_in_collective()
    """
    family = supervisor([spec(logs, "trainer", code)], heartbeat_timeout_s=0.5)
    family.on_status(report("trainer", "ready", "rank 1"))
    with pytest.raises(
        RunFailed, match=r"(?s)no heartbeat for 0.5 s \(last: waiting for rank 1\).*stuck_in_collective"
    ):
        family.run()


def test_the_supervisor_standing_still_blames_nobody(logs: Path) -> None:
    family = supervisor([spec(logs, "trainer", "import time; time.sleep(0.5)")], heartbeat_timeout_s=5)
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
    family = Child(spec(logs, "family", code))
    deaf = Child(spec(logs, "deaf", DEAF))
    wait_for(lambda: len(family.last_lines()) == 2 and deaf.last_lines())
    pids = [int(line) for line in family.last_lines()]
    wait_for(lambda: all(alive(pid) for pid in pids))
    time.sleep(0.3)
    began = time.monotonic()
    assert local.stop([family, deaf], grace_s=0.5) == ["deaf"]
    assert time.monotonic() - began < 2
    assert not any(alive(pid) for pid in [*pids, family.pid, deaf.pid])


def test_grandchild_that_lost_its_parent_is_stopped_too(logs: Path) -> None:
    middle = FAMILY + f"print(spawn({SLEEP!r}, start_new_session=True), flush=True); time.sleep(0.8)"
    code = f"subprocess.run([sys.executable, '-c', {middle!r}]); time.sleep(60)"
    child = Child(spec(logs, "c", code))
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
    code = "x = bytearray(60_000_000); x[::4096] = b'1' * len(x[::4096]); print('full', flush=True); time.sleep(60)"
    child = Child(spec(logs, "trainer", code))
    sampler = MemorySampler()
    sampler.start(lambda: {child.pid: "trainer"})
    wait_for(child.last_lines)
    total = sampler.sample()
    sampler.close()
    local.stop([child])
    assert 60e6 < sampler.peak_by_name["trainer"] < 120e6
    assert total == sum(sampler.peak_by_name.values()) == sampler.peak_bytes
    assert set(sampler.peak_by_name) == {"trainer", "supervisor"} and sampler.kind == "pss"


INTERRUPTED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_supervise as t
logs = Path({logs!r})
grand = "print(spawn('import time; time.sleep(60)'), flush=True); time.sleep(60)"
specs = [t.spec(logs, "rollout", grand), t.spec(logs, "trainer", t.DEAF)]
def note(s): (logs / "pids").write_text(" ".join(str(c.pid) for c in s.children.values()))
family = t.supervisor(specs, tick=note)
print("interrupted", family.run().interrupted, flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_within_five_seconds(logs: Path, signum: int) -> None:
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), logs=str(logs))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: (logs / "rollout.log").exists() and (logs / "rollout.log").read_text().strip())
    wait_for(lambda: "deaf" in (logs / "trainer.log").read_text())
    # the children may have been quicker
    wait_for(lambda: (logs / "pids").exists() and len((logs / "pids").read_text().split()) == 2)
    pids = [int(p) for p in (logs / "pids").read_text().split()] + [int((logs / "rollout.log").read_text())]
    assert len(pids) == 3 and all(alive(pid) for pid in pids)
    began = time.monotonic()
    os.kill(process.pid, signum)
    stdout, _ = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert stdout == "interrupted True\n"
    assert not any(alive(pid) for pid in pids)


def test_exit_words() -> None:
    assert exit_words(3) == "exit code 3"
    assert exit_words(-15) == "signal 15 (SIGTERM)"
    assert exit_words(-99) == "signal 99"


def test_ports_differ_and_can_be_bound(logs: Path) -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        bind("127.0.0.1", port).close()


# -- what may pass: the run goes on from its checkpoint --------------------------------------------------------------


class Again:
    """Stands for the job: where the run goes on from, and with which children."""

    def __init__(self, specs: list[ChildSpec], step: int = 4):
        self.specs, self.step, self.numbers = specs, step, [0]

    def __call__(self, number: int) -> Start:
        self.numbers.append(number)
        return Start(self.step, self.specs, None)


GPU = "error: the GPU reported an error: CUDA error: unspecified launch failure"


def test_a_trainer_that_dies_of_what_may_pass_goes_on_with_everyone(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dies = f"time.sleep(0.4); print({GPU!r}, file=sys.stderr); sys.exit({transient.EXIT})"
    specs = [spec(logs, "rollout", SLEEP), spec(logs, "trainer", dies)]
    again = Again([specs[0], spec(logs, "trainer", "time.sleep(0.4)")])
    resumes = Resumes(2, again)
    pids: set[int] = set()
    told: list[bool] = []

    def tick(family: Supervisor) -> None:
        pids.update(child.pid for child in family.children.values() if child.name == "rollout")
        if not told:
            told.append(True)
            family.on_status(report("trainer", step=7))
            family.on_status(report("rollout"))
        elif len(again.numbers) == 2:
            family.on_status(report("trainer", step=7))
            family.on_status(report("rollout"))

    family = supervisor(specs, resumes=resumes, tick=tick)
    outcome = family.run()
    assert not outcome.interrupted and again.numbers == [0, 1] and len(pids) == 2
    (taken,) = resumes.taken
    assert (taken.at_step, taken.from_step, taken.cause) == (7, 4, GPU.removeprefix("error: "))
    assert taken.seconds is not None and 0 < taken.seconds < 10
    assert outcome.phases["resuming"] > 0
    said = capfd.readouterr().err
    assert "`trainer` ended with exit code 75 at step 7 (the GPU reported an error: CUDA error: unspec" in said
    assert "the run goes on from the checkpoint of step 4, time 1 of 2" in said


@pytest.mark.parametrize(
    ("first", "then", "code", "limit", "refused"),
    [
        (GPU, GPU, transient.EXIT, 5, r"code 75; it ended so at step 0 before, and got no further"),
        (GPU, f"{GPU} of another kind", transient.EXIT, 1, r"code 75; launch.max_resumes = 1 are used up"),
        ("error: the gradient norm of step 3 is nan", "", 1, 5, r"code 1; its last lines"),
        ("Traceback\nValueError: shapes", "", 1, 5, r"code 1; its last lines"),
    ],
)
def test_what_would_only_be_repeated_ends_the_run(
    logs: Path, first: str, then: str, code: int, limit: int, refused: str
) -> None:
    def dies(words: str) -> list[ChildSpec]:
        return [spec(logs, "trainer", f"print({words!r}, file=sys.stderr); sys.exit({code})")]

    with pytest.raises(RunFailed, match=refused):
        supervisor(dies(first), resumes=Resumes(limit, Again(dies(then), step=0))).run()


def test_the_rank_that_failed_for_good_speaks_for_those_that_lost_it(logs: Path) -> None:
    """Rank 1 notices first, and would be worth another try."""
    lost = f"print('error: {transient.LINK}: Connection closed by peer', file=sys.stderr); sys.exit({transient.EXIT})"
    failed = "time.sleep(0.6); print('error: the loss is nan', file=sys.stderr); sys.exit(1)"
    again = Again([])
    specs = [spec(logs, "trainer", failed, "trainer"), spec(logs, "trainer1", lost, "trainer")]
    with pytest.raises(RunFailed, match=r"(?s)`trainer` ended with exit code 1; .*the loss is nan"):
        supervisor(specs, resumes=Resumes(3, again)).run()
    assert again.numbers == [0]


def test_restarts_count_over_a_window() -> None:
    now = [0.0]
    restarts = Restarts(100.0, clock=lambda: now[0])
    for at in (0.0, 60.0, 90.0):
        now[0] = at
        restarts.add("engine0")
    assert restarts.recent("engine0") == 3 and restarts.recent("engine1") == 0
    now[0] = 130.0
    assert restarts.recent("engine0") == 2
    now[0] = 1000.0
    assert restarts.recent("engine0") == 0


@pytest.mark.parametrize(
    ("code", "line", "passes"),
    [
        (-signal.SIGABRT, "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", True),
        (-signal.SIGKILL, "", True),
        (None, "", True),
        (-signal.SIGILL, "", False),
        (-signal.SIGTERM, "", False),
        (1, "error: the GPU ran out of memory: CUDA out of memory", False),
        (0, "", False),
        (2, "error: `train.steps` is wrong", False),
    ],
)
def test_which_ends_may_pass(code: int | None, line: str, passes: bool) -> None:
    assert (transient.cause(code, [line]) is not None) is passes
