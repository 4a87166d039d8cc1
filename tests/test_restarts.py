"""What may pass: the run goes on from its checkpoint by itself; everything else ends it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from family import SLEEP, process, report, supervisor

from astracli.errors import RunFailed
from astracli.launch.launcher import Process
from astracli.launch.restarts import Restarts, Resumes, Start
from astracli.launch.supervise import Supervisor
from astracli.process import transient
from astracli.process.config import Role


class Again:
    """Stands for the job: where the run goes on from, and with which children."""

    def __init__(self, specs: list[Process], step: int = 4):
        self.specs, self.step, self.numbers = specs, step, [0]

    def __call__(self, number: int) -> Start:
        self.numbers.append(number)
        return Start(self.step, self.specs, None)


GPU = "error: the GPU reported an error: CUDA error: unspecified launch failure"


def test_a_trainer_that_dies_of_what_may_pass_goes_on_with_everyone(
    logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dies = f"time.sleep(0.4); print({GPU!r}, file=sys.stderr); sys.exit({transient.EXIT})"
    specs = [process(logs, "rollout", SLEEP), process(logs, "trainer", dies)]
    again = Again([specs[0], process(logs, "trainer", "time.sleep(0.4)")])
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
    assert not family.run() and again.numbers == [0, 1] and len(pids) == 2
    (taken,) = resumes.taken
    assert (taken.at_step, taken.from_step, taken.cause) == (7, 4, GPU.removeprefix("error: "))
    assert taken.seconds is not None and 0 < taken.seconds < 10
    assert family.phases()["resuming"] > 0
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
    def dies(words: str) -> list[Process]:
        return [process(logs, "trainer", f"print({words!r}, file=sys.stderr); sys.exit({code})")]

    with pytest.raises(RunFailed, match=refused):
        supervisor(dies(first), resumes=Resumes(limit, Again(dies(then), step=0))).run()


def test_the_rank_that_failed_for_good_speaks_for_those_that_lost_it(logs: Path) -> None:
    """Rank 1 notices first, and would be worth another try."""
    lost = f"print('error: {transient.LINK}: Connection closed by peer', file=sys.stderr); sys.exit({transient.EXIT})"
    failed = "time.sleep(0.6); print('error: the loss is nan', file=sys.stderr); sys.exit(1)"
    again = Again([])
    specs = [process(logs, "trainer", failed), process(logs, "trainer1", lost, Role.TRAINER)]
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
