"""One run, killed again and again: kill -9 of every process at random moments, a resume after each, then the books.

    python bench/loop/kill_resume.py [--kills 4] [--seed 0] [--children engine0 rollout ...] [--run-dir DIR]

`--kills` is per process. Half of the kills fall into an attempt's start-up, half into training. The last attempt runs
to its end; then the run must have lost no group, trained none twice, acknowledged every batch once and have one
evaluation for every step at which one became due. Prints a row per process and a line per rule, and exits 1 when a rule
is broken. About 10 s a kill.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import ASTRA, RECIPE, command, folder, options, records, show, trained

from loop.books import acked, check_files, check_hub

CHILDREN = ("engine0", "rollout", "trainer", "eval", "supervisor")
EVERY = 5
ITEMS = {"arithmetic-heldout": 256}
SMALL = [
    "train.steps=100000", "train.batch_groups=4", "train.minibatches=1", "train.max_staleness=2",
    'train.schedule="constant"', "rollout.group_size=4", "checkpoint.every=2", f"eval.every={EVERY}", "eval.samples=1",
    "eval.pass_k=1",
]  # fmt: skip
STARTUP_S = 6.0
RUNNING_S = 4.0
LAST_STEPS = 6
"""Steps that the last attempt trains beyond the last batch that was ever made."""


class Attempt:
    """One `astra train` in `run`: a new run, or the resume of what is there."""

    def __init__(
        self, run: Path, sets: Sequence[str], *, resume: bool, recipe: str = RECIPE, before: Sequence[str] = (),
        env: Mapping[str, str] | None = None, folder: Path | None = None, module: str = "astracli",
    ):  # fmt: skip
        """`before`: a command in front, which becomes `astra` (`taskset -c 0`). `env`: beside this process's. `folder`:
        where it is started, else that of the run. `module`: what is `astra`."""
        self.run = run
        folder = folder or run.parent
        words = command("train", run, sets, recipe)
        if resume:
            words = [*ASTRA, "train", "--resume", str(run), *words[words.index(str(run)) + 1 :]]
        words = [module if word == "astracli" else word for word in words]
        self.log = folder / f"{run.name}.log"
        self.log.write_text("")
        self._before = len(records(run))
        self.began = time.monotonic()
        self.supervisor = shared.start(
            [*before, *words], folder, self.log, env={**os.environ, **(env or {})}, apart=True
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def new_records(self) -> list[dict[str, Any]]:
        """What was added to metrics.jsonl since this attempt began."""
        return records(self.run)[self._before :]

    def steps(self) -> list[int]:
        """Steps that this attempt has trained."""
        return [r["step"] for r in trained(self.new_records())]

    def wait(self, ready: Callable[[], bool], timeout_s: float = 120.0) -> bool:
        """Until `ready()`; False when the attempt ended before, or time ran out."""
        while self.supervisor.poll() is None and self.seconds < timeout_s:
            if ready():
                return True
            time.sleep(0.04)
        return False

    def kill(self, name: str) -> bool:
        """kill -9 one process of this attempt, `supervisor` or a child by its name. False when it was not there."""
        if name == "supervisor":
            os.kill(self.supervisor.pid, signal.SIGKILL)
            return True
        process = self.child(name)
        if process is None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        return True

    def child(self, name: str) -> psutil.Process | None:
        """The child whose config file is RUN/config/NAME.json."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.supervisor.pid).children():
                with suppress(psutil.Error):  # one that has just ended
                    if str(self.run / "config" / f"{name}.json") in process.cmdline():
                        return process
        return None

    def end(self, timeout_s: float = 150.0) -> tuple[int, str]:
        """(exit code, what it said), once it has ended. An attempt that hangs is killed and answers -9."""
        try:
            code = self.supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.kill(self.supervisor.pid, signal.SIGKILL)
            code = self.supervisor.wait()
        return code, self.log.read_text()


@dataclass
class Tally:
    """What happened to one process."""

    starting: int = 0
    running: int = 0
    steps: int = 0
    """Trained in the attempts that it ended."""
    slowest_end_s: float = 0.0
    """From the kill to the end of the supervisor."""


@dataclass
class Bench:
    run: Path
    draw: random.Random
    tallies: dict[str, Tally] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    attempts: int = 0

    def attempt(self, victim: str, early: bool) -> None:
        """One attempt and its end. An attempt that ends by itself, or wrongly, is a problem."""
        resume = (self.run / "recipe.json").exists()
        attempt = Attempt(self.run, [] if resume else SMALL, resume=resume)
        self.attempts += 1
        delay = self.draw.uniform(0.3, STARTUP_S) if early else self.draw.uniform(0.0, RUNNING_S)
        if not early and not attempt.wait(lambda: bool(attempt.steps())):
            self._failed(attempt, f"no step before the kill of {victim}")
            return
        time.sleep(delay)
        if not attempt.wait(lambda: attempt.kill(victim)):
            self._failed(attempt, f"{victim} was not there to be killed")
            return
        killed = time.monotonic()
        code, console = attempt.end()
        tally = self.tallies.setdefault(victim, Tally())
        tally.slowest_end_s = max(tally.slowest_end_s, time.monotonic() - killed)
        tally.starting += not attempt.steps()
        tally.running += bool(attempt.steps())
        tally.steps += len(set(attempt.steps()))
        if victim != "supervisor" and (code != 1 or f"`{victim}`" not in console or "--resume" not in console):
            self.problems.append(f"attempt {self.attempts}, {victim} killed: exit {code}, {console[-600:]}")

    def _failed(self, attempt: Attempt, what: str) -> None:
        if attempt.supervisor.poll() is None:
            os.kill(attempt.supervisor.pid, signal.SIGTERM)
        code, console = attempt.end()
        self.problems.append(f"attempt {self.attempts}: {what}; exit {code}, {console[-1500:]}")

    def finish(self) -> int:
        """The last attempt, to its end. -> the run's steps."""
        steps = acked(self.run) + LAST_STEPS
        attempt = Attempt(self.run, [f"train.steps={steps}"], resume=True)
        self.attempts += 1
        code, console = attempt.end(300)
        if code:
            self.problems.append(f"the last attempt: exit {code}, {console[-1500:]}")
        return steps


def main() -> None:
    parser = options(__doc__, kills={4: "of each process"}, seed=0, run_dir=Path)
    parser.add_argument("--children", nargs="+", choices=CHILDREN, default=list(CHILDREN))
    args = parser.parse_args()
    draw = random.Random(args.seed)
    plan = [(name, number % 2 == 1) for name in args.children for number in range(args.kills)]
    draw.shuffle(plan)
    began = time.monotonic()
    with folder() as name:
        bench = Bench((args.run_dir or name / "run").resolve(), draw)
        bench.run.parent.mkdir(parents=True, exist_ok=True)
        for victim, early in plan:
            bench.attempt(victim, early)
            if len(bench.problems) > 3:
                break
        steps = bench.finish()
        rules = check_hub(bench.run, steps) | check_files(bench.run, steps, ITEMS) if not bench.problems else {}
    rows = [{"killed": name, **vars(tally)} for name, tally in sorted(bench.tallies.items())]
    kept = [{"rule": rule, "kept": not broken, "broken by": broken[:8]} for rule, broken in rules.items()]
    found = {"attempts": bench.attempts, "steps": steps, "seconds": time.monotonic() - began, "seed": args.seed}
    show(args, {**found, "problems": bench.problems, "rows": rows, "rules": kept})
    sys.exit(1 if bench.problems or any(rules.values()) else 0)


if __name__ == "__main__":
    main()
