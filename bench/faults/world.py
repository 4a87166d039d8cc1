"""A run of the shipped recipe at its smallest, something done to it, and what must hold of it afterwards."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.books import acked, check_files, check_hub
from loop.kill_resume import Attempt
from shared import say

ITEMS = {"small": 6}
SMALLEST = (
    "train.batch_groups=2", "train.minibatches=1", "train.max_staleness=1", 'train.schedule="constant"',
    "rollout.group_size=4", "rollout.max_new_tokens=8", "checkpoint.every=2", 'eval.benchmarks=["small.jsonl"]',
    "eval.every=4", "eval.samples=1", "eval.pass_k=1", "data.reward=coin:coin",
)  # fmt: skip
COIN = '''"""1 for about half of all answers, whatever the model is. Answers to the benchmark take their time, so that
something can happen to an evaluation."""

import time
import zlib


def coin(problem, answer, completion):
    if problem.startswith("slowly "):
        time.sleep(0.3)
    return float(zlib.crc32((problem + completion).encode()) & 1)
'''
MARK = "ASTRA_FAULTS"
"""Environment variable by which every process of an attempt is found, whatever it forked and wherever it moved to."""
GONE_S = 25.0
"""Children look for their supervisor each second, and give an unreachable hub ten."""
SHARED = ("torch_", "psm_", "sem.", "nccl-", "gloo")
"""How names of shared memory begin that torch, Python, NCCL and gloo make."""
STAGE = "stage/ is left"


@dataclass
class Row:
    """One fault and its end."""

    fault: str
    where: str
    outcome: str = ""
    seconds: float = 0.0
    said: str = ""
    """Its cause, as the first line of the message gives it."""
    problems: list[str] = field(default_factory=list)

    def table(self) -> dict[str, Any]:
        problems = "; ".join(self.problems) or "none"
        found = {"fault": self.fault, "where": self.where, "outcome": self.outcome, "seconds": self.seconds}
        return {**found, "said": self.said[:110], "problems": problems[:600]}


class World:
    """A folder with a reward, a benchmark and a place for temporary files, in which runs lie."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder = folder
        self.draw = random.Random(seed)
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True, exist_ok=True)
        (folder / "coin.py").write_text(COIN)
        lines = [json.dumps({"problem": f"slowly {n}+1", "answer": str(n + 1)}) for n in range(ITEMS["small"])]
        (folder / "small.jsonl").write_text("\n".join(lines) + "\n")
        self._shm = shared_memory()

    def start(
        self, run: Path, steps: int | None = None, sets: Sequence[str] = (), *, before: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Attempt:  # fmt: skip
        """A new run, or the resume of one. `steps`: that it trains beyond the last batch that there is."""
        resume = (run / "recipe.json").exists()
        begun = acked(run) if (run / "hub.sqlite").exists() else 0
        wanted = [] if steps is None else [f"train.steps={begun + steps}"]
        # relative names of the reward and the benchmark are found from the folder, wherever the run lies
        words = wanted if resume else [*SMALLEST, *wanted]
        marked = {MARK: str(run), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1", **(env or {})}
        return Attempt(
            run, [*words, *sets], resume=resume, before=before, env=marked, folder=self.folder,
            module="hooked" if "PYTHONPATH" in marked else "astracli",
        )  # fmt: skip

    def left_behind(self, run: Path, wait_s: float = GONE_S) -> list[str]:
        """Processes, shared memory and files that no process of the run uses any more. Processes and temporary files
        are removed, so that the next row begins clean; what is new in /dev/shm may be somebody else's."""
        end = time.monotonic() + wait_s
        while (found := marked(run)) and time.monotonic() < end:
            time.sleep(0.1)
        words = [f"process {p.pid} is left: {' '.join(_cmdline(p))[:100]}" for p in found]
        for process in found:
            process.kill()
        for name in sorted(shared_memory() - self._shm):
            if name.startswith(SHARED) and not in_use(f"/dev/shm/{name}"):
                words.append(f"/dev/shm/{name} is left")
        for path in self.tmp.iterdir():
            if path.name.startswith("torchinductor_"):  # torch makes this folder when it is imported, and keeps it
                continue
            words.append(f"{path.name} is left in the folder for temporary files")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (run / "stage").exists():
            words.append(STAGE)
        return words + [f"{path} is left" for path in run.rglob(".*.tmp")]

    def judge(
        self, row: Row, attempt: Attempt, causes: Sequence[str], *, limit_s: float = 150.0, can_write: bool = True
    ) -> Row:
        """Wait for the end of an attempt and look at it: finished, interrupted, or ended with one of `causes`
        (patterns). An exit code of 2 is an end too, where a cause is given. Fills the row in. `can_write`: False where
        nothing can be written or removed at the run's end."""
        code, console = attempt.end(limit_s)
        row.seconds = attempt.seconds
        errors = [line for line in console.splitlines() if line.startswith("error: ")]
        row.said = errors[0].removeprefix("error: ") if errors else ""
        row.outcome = {0: "finished", 130: "interrupted", -signal.SIGKILL: "killed"}.get(code, f"ended, exit {code}")
        if row.outcome == "killed" and attempt.seconds >= limit_s:
            row.problems.append(f"it hung: {console[-800:]}")
        if "Traceback" in console or "unexpected" in console:
            row.problems.append(f"a traceback or `unexpected`: {console[-1500:]}")
        if code in (1, 2):
            if not any(re.search(cause, console) for cause in causes):
                row.problems.append(f"none of the causes {list(causes)}: {console[-800:]}")
            if len(errors) != 1 or "hint: " not in console:
                row.problems.append(
                    f"{len(errors)} lines begin with `error:`; without a hint: {'hint: ' not in console}"
                )
        elif code not in (0, 130, -signal.SIGKILL):
            row.problems.append(f"exit {code}: {console[-800:]}")
        row.problems += self._told(attempt.run, code, row.said) if can_write else []
        left = self.left_behind(attempt.run)
        kept = code in (2, -signal.SIGKILL) or not can_write  # the resume removes what is left in the run's directory
        row.problems += [words for words in left if not kept or words != STAGE]
        return row

    def _told(self, run: Path, code: int, said: str) -> list[str]:
        """status.json beside the exit code. Nothing can be asked of a run whose directory was never made."""
        try:
            status = json.loads((run / "status.json").read_text())
        except (FileNotFoundError, ValueError):  # refused before it began, or what the row has damaged
            return []
        wanted = {0: "done", 1: "failed", 130: "interrupted", -signal.SIGKILL: "running"}.get(code)
        if wanted is not None and status["state"] != wanted:
            return [f"status.json says {status['state']} ({status['cause']}), its exit code was {code}"]
        if code == 1 and (status["cause"] or "").split(";")[0][:40] not in said:
            return [f"status.json gives the cause {status['cause']!r}"]
        return []

    def finish(self, run: Path, row: Row, sets: Sequence[str] = ()) -> Row:
        """Resume to an end two steps further on; the books must be whole."""
        if not (run / "recipe.json").exists():  # it was refused before it began
            return row
        last = self.start(run, 2, sets)
        code, console = last.end()
        if code:
            row.problems.append(f"the resume: exit {code}: {console[-800:]}")
        else:
            row.outcome += ", resumed to its end"
            row.problems += self.books(run)
        row.problems += self.left_behind(run)
        return row

    def books(self, run: Path) -> list[str]:
        """Rules of the books that are broken."""
        steps = acked(run)
        rules = check_hub(run, steps) | check_files(run, steps, ITEMS)
        return [f"{rule}: {broken[:4]}" for rule, broken in rules.items() if broken]

    def template(self, steps: int = 6) -> Path:
        """A run that was killed with its supervisor after so many steps; copies of it can be resumed."""
        run = self.folder / "template"
        if not run.exists():
            attempt = self.start(run, 1000)
            attempt.wait(lambda: len(attempt.steps()) >= steps and attempt.kill("supervisor"))
            attempt.end()
            self.left_behind(run)
        return run

    def copy(self, name: str) -> Path:
        """Of the template."""
        return Path(shutil.copytree(self.template(), self.folder / name))


# ---- processes of a run


def marked(run: Path) -> list[psutil.Process]:
    """Every process that an attempt of this run has started, and itself: by its environment, its working directory or
    its command line, one of which a process keeps wherever it moves to."""
    found, mark, config = [], f"{MARK}={run}".encode(), str(run / "config")
    for process in psutil.process_iter():
        try:
            place = Path(f"/proc/{process.pid}")
            ours = mark in (place / "environ").read_bytes().split(b"\0")
            ours = ours or os.readlink(place / "cwd") == str(run.parent) or config in " ".join(_cmdline(process))
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def victim(attempt: Attempt, name: str) -> psutil.Process | None:
    """A process of an attempt by its name: `supervisor`, a worker, `fork_server`, `grader`, `guard` (of a grader)."""
    if name == "supervisor":
        return psutil.Process(attempt.supervisor.pid)
    ends = {"fork_server": "fork_server", "grader": "astracli.rewards.grade_worker", "guard": "sandbox_guard.py"}
    if name not in ends:
        return attempt.child(name)
    for process in psutil.Process(attempt.supervisor.pid).children(recursive=True):
        words = _cmdline(process)
        is_guard = any(word.endswith(ends["guard"]) for word in words)
        if any(word.endswith(ends[name]) for word in words) and is_guard == (name == "guard"):
            return process
    return None


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def phase(attempt: Attempt) -> str:
    """starting, training, finishing (the last evaluations run), stopping, or over."""
    if attempt.supervisor.poll() is not None:
        return "over"
    console = (attempt.log).read_text()
    if "\nstopping" in console:
        return "stopping"
    if "training is done" in console:
        return "finishing"
    return "training" if attempt.steps() else "starting"


# ---- shared memory


def shared_memory() -> set[str]:
    place = Path("/dev/shm")
    return {path.name for path in place.iterdir()} if place.is_dir() else set()


def in_use(path: str) -> bool:
    """Whether a living process maps the file, or has it open."""
    for process in psutil.process_iter():
        try:
            if path in Path(f"/proc/{process.pid}/maps").read_text():
                return True
            if any(os.readlink(link) == path for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                return True
        except OSError:
            continue
    return False


# ---- rows


def attempted(row: Row, work: Callable[[Row], Row]) -> Row:
    """`work(row)`; what goes wrong in the bench itself is a problem of the row. Said as soon as it is known."""
    began = time.monotonic()
    try:
        row = work(row)
    except Exception as error:
        row.problems.append(f"the bench itself: {type(error).__name__}: {error}")
    row.seconds = round(row.seconds or time.monotonic() - began, 1)
    say(row.table())
    return row
