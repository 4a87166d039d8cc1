"""Runs of `astra train` that lose a process to kill -9, for the benches that look at what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ASTRA, command, records, trained

CHILDREN = ("engine0", "rollout", "trainer", "eval", "supervisor")


class Attempt:
    """One `astra train` in `run`: a new run, or the resume of what is there."""

    def __init__(self, run: Path, sets: Sequence[str], *, resume: bool):
        self.run = run
        words = command("train", run, sets)
        if resume:
            words = [*ASTRA, "train", "--resume", str(run), *words[words.index(str(run)) + 1 :]]
        self._talk = (run.parent / f"{run.name}.log").open("w+")
        self._before = len(records(run))
        self.began = time.monotonic()
        self.supervisor = subprocess.Popen(
            words,
            cwd=run.parent, stdin=subprocess.DEVNULL, stdout=self._talk, stderr=self._talk, start_new_session=True,
        )  # fmt: skip

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
            time.sleep(0.02)
        return False

    def kill(self, name: str) -> bool:
        """kill -9 one process of this attempt, `supervisor` or a child by its name. False when it was not there."""
        if name == "supervisor":
            self.supervisor.kill()
            return True
        process = self.child(name)
        if process is None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        return True

    def child(self, name: str) -> psutil.Process | None:
        """The child whose config file is RUN/config/NAME.json."""
        try:
            for process in psutil.Process(self.supervisor.pid).children():
                if str(self.run / "config" / f"{name}.json") in process.cmdline():
                    return process
        except psutil.Error:
            pass
        return None

    def end(self, timeout_s: float = 150.0) -> tuple[int, str]:
        """(exit code, what it said), once it has ended. An attempt that hangs is killed and answers -9."""
        try:
            code = self.supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            code = self.supervisor.wait()
        self._talk.seek(0)
        return code, self._talk.read()


def processes_of(run: Path) -> list[int]:
    """Ids of processes that still run with a config of this run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run / "config") in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
