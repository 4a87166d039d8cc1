"""The processes that compute one reward: started when needed, killed when an answer takes too long.

Each process (`grade_process.py`) has a thread (`grade_driver.py`) that takes jobs, some samples of one prompt, from a
queue. A process of an `async def` has several jobs at once, any other has one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from astracli.errors import RunFailed
from astracli.rewards.builtin import BUILTIN
from astracli.rewards.grade_driver import Driver, Job
from astracli.rewards.grade_process import RewardSetting
from astracli.rewards.scores import Scored
from astracli.rewards.types import GradeItem

_BATCH = 64


class Graders:
    """`workers` processes for one reward. Thread-safe."""

    def __init__(self, setting: RewardSetting, workers: int):
        self.setting = setting
        self._jobs: deque[Job] = deque()
        self._known: Mapping[str, Any] | None = None
        if setting.spec in BUILTIN:
            self._known = {"sees_group": False, "maximum": 1.0}
        self.closed = threading.Event()
        self._drivers = [Driver(self, number) for number in range(workers)]

    @property
    def maximum(self) -> float:
        """The reward's largest value; known once a process has started."""
        declared = 1.0 if self._known is None else float(self._known["maximum"])
        return declared if self.setting.maximum is None else self.setting.maximum

    def known(self, ready: Mapping[str, Any]) -> None:
        self._known = ready

    def submit(self, items: Sequence[GradeItem]) -> list[Future[list[Scored]]]:
        """Futures of the items' scores, in order. Items of one prompt stay together where the reward looks at others,
        and as long as that is not known."""
        whole = self._known is None or self._known["sees_group"]
        size = len(items) if whole else max(1, min(_BATCH, -(-len(items) // len(self._drivers))))
        jobs = []
        for start in range(0, len(items), max(1, size)):
            some = items[start : start + size]
            jobs.append(Job(some, Future(), [None] * len(some)))
        self._jobs.extend(jobs)
        for driver in self._drivers:
            driver.wake()
        return [job.future for job in jobs]

    def take(self) -> Job | None:
        """The next job that somebody still waits for."""
        with suppress(IndexError):
            while True:
                job = self._jobs.popleft()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    return job
        return None

    def first(self, job: Job) -> None:
        """A job comes back: before all others."""
        self._jobs.appendleft(job)

    def close(self) -> None:
        """Kill the processes; what is being graded fails with RunFailed."""
        self.closed.set()
        for driver in self._drivers:
            driver.interrupt()
        for driver in self._drivers:
            driver.join()
        while (job := self.take()) is not None:
            job.future.set_exception(RunFailed("the grading processes are closed"))
