"""Runs of `astra train` that lose a process to kill -9, for the benches that look at what is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ASTRA = [sys.executable, "-m", "astracli"]
RECIPE = "qwen3.5-tiny-m2po-delta"
CHILDREN = ("engine0", "rollout", "trainer", "eval", "supervisor")


def words(sets: Sequence[str]) -> list[str]:
    """`--set` before every one."""
    return [word for value in sets for word in ("--set", value)]


class Attempt:
    """One `astra train` in `run`: a new run, or the resume of what is there."""

    def __init__(self, run: Path, sets: Sequence[str], *, resume: bool):
        self.run = run
        where = ["--resume", str(run)] if resume else ["--recipe", RECIPE, "--run-dir", str(run)]
        self._console = (run.parent / f"{run.name}.log").open("w+")
        self._before = len(records(run))
        self.began = time.monotonic()
        self.supervisor = subprocess.Popen(
            [*ASTRA, "train", *where, *words(sets)],
            cwd=run.parent, stdin=subprocess.DEVNULL, stdout=self._console, stderr=self._console,
            start_new_session=True,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def new_records(self) -> list[dict[str, Any]]:
        """What was added to metrics.jsonl since this attempt began."""
        return records(self.run)[self._before :]

    def steps(self) -> list[int]:
        """Steps that this attempt has trained."""
        return [r["step"] for r in self.new_records() if r["process"] == "trainer" and "loss" in r]

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
        self._console.seek(0)
        return code, self._console.read()


def records(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; half a line is left out."""
    found = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


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
