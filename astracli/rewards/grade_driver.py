"""The thread of one grading process: sends it jobs, reads the scores, replaces it when it is late or gone."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from astracli.errors import RunFailed, machine_failed
from astracli.rewards.builtin import CODE
from astracli.rewards.channel import GarbledError
from astracli.rewards.grade_process import Process, item_fields, score_of
from astracli.rewards.scores import Scored
from astracli.rewards.types import GradeItem

if TYPE_CHECKING:
    from astracli.rewards.graders import Graders

_SEND_S = 10.0
"""At most so long a process may not take what it is sent, where `timeout_s` is longer or there is none."""
_LOOP_S = 2.0
"""Beside `timeout_s`, for an event loop to end a call by itself; then it is blocked."""


@dataclass
class Job:
    items: Sequence[GradeItem]
    future: Future[list[Scored]]
    scores: list[Scored | None]
    crashes: Counter[int] = field(default_factory=Counter)
    places: Sequence[int] = ()
    """Of the items that were sent last."""

    @property
    def open(self) -> list[int]:
        """Places without a score."""
        return [place for place, score in enumerate(self.scores) if score is None]


class Driver:
    """The thread of one process."""

    def __init__(self, owner: Graders, number: int):
        self._owner, self._setting = owner, owner.setting
        self.process: Process | None = None
        self._flying: dict[int, Job] = {}
        self._sent = 0
        self._progress = time.monotonic()
        """When the last score came, or the first job was sent."""
        self._loading = False
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._thread: threading.Thread | None = None
        self._number = number
        self._starting = threading.Lock()

    def wake(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"grade_{self._number}", daemon=True)
                self._thread.start()
        with suppress(OSError):
            self._waker.send(b"\0")

    def interrupt(self) -> None:
        """From any thread: the process is killed, and the driver notices."""
        with suppress(OSError):
            self._waker.send(b"\0")
        process = self.process
        if process is not None:
            process.kill()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._woken.close()
        self._waker.close()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._owner.closed.is_set():
                try:
                    self._step()
                except (EOFError, OSError) as error:
                    self._crashed(error)
                except Exception as error:  # a reward that is refused, a row that cannot be sent: nobody waits for ever
                    self._kill()
                    self._fail_all(error)
        finally:
            self._kill()
            self._fail_all(RunFailed("the grading processes are closed"))

    def _step(self) -> None:
        """Send what there is to send; then wait for a score, a job, or the end of a limit."""
        while self._has_room() and (job := self._owner.take()) is not None:
            self._send(job)
        left = self._left() if self._flying else None
        process = self.process
        if process is not None and self._flying and process.channel.waiting():
            self._receive(process)
            return
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if process is not None and self._flying:
            poll.register(process.channel.fileno, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if left is None else max(0.0, 1000 * left))}
        if self._woken.fileno() in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)
        if process is not None and process.channel.fileno in ready and self._flying:
            self._receive(process)
        elif left is not None and self._left() <= 0:
            self._late()

    def _has_room(self) -> bool:
        if not self._flying:
            return True
        concurrent = self.process is not None and self.process.ready.get("concurrent")
        return bool(concurrent) and sum(len(job.open) for job in self._flying.values()) < self._setting.concurrency

    def _left(self) -> float:
        """Seconds until the process is too late."""
        assert self.process is not None
        ready, limit = self.process.ready, self._setting.timeout_s
        if self._loading:
            limit = self._setting.start_s
        elif ready.get("grouped"):
            limit *= max(len(job.items) for job in self._flying.values())
        if ready.get("concurrent"):
            limit += _LOOP_S
        if self._setting.spec in CODE:
            from astracli.rewards.code import START_S

            limit += START_S
        return self._progress + limit - time.monotonic()

    def _send(self, job: Job) -> None:
        """All of the job, or what is left of it. A process that does not take it is given up, twice at most."""
        if not job.items:
            job.future.set_result([])
            return
        number, self._sent = self._sent, self._sent + 1
        if not self._flying:
            self._progress = time.monotonic()
        self._flying[number] = job
        if self.process is None:
            self._start()
        assert self.process is not None
        needs = self.process.ready["needs"]
        places = range(len(job.items)) if self.process.ready["sees_group"] else job.open
        job_items = [item_fields(job.items[place], needs) for place in places]
        job.places = list(places)
        try:
            self.process.channel.send({"job": number, "items": job_items}, min(self._setting.timeout_s, _SEND_S))
        except TimeoutError:
            self._crashed(TimeoutError("it does not read what it is sent"))
            return
        if len(self._flying) == 1:
            self._progress = time.monotonic()

    def _start(self) -> None:
        try:
            process = self.process = Process(self._setting)
        except OSError as error:  # no fault of the reward: a score of 0 would be a wrong one
            failed = machine_failed(error)
            words = failed.message if failed else f"{error}"
            raise RunFailed(f"no grading process could be started: {words}", failed.hint if failed else None) from error
        try:
            if self._owner.closed.is_set():
                raise RunFailed("the grading processes are closed")
            process.start()
        except BaseException:
            self._kill()
            raise
        self._owner.known(process.ready)
        self._progress = time.monotonic()

    def _receive(self, process: Process) -> None:
        try:
            frame = process.channel.receive(max(0.05, self._left()))
        except TimeoutError:
            self._late()
            return
        except GarbledError as error:
            self._crashed(error)
            return
        if frame in (["loading"], ["loaded"]):
            self._loading = frame == ["loading"]
            self._progress = time.monotonic()
            return
        found = score_of(frame)
        job = self._flying.get(found[0]) if found is not None else None
        if found is None or job is None or not 0 <= found[1] < len(job.places):
            self._crashed(GarbledError("it wrote something that is no grade to its owner's socket"))
            return
        number, place, scored = found
        self._progress = time.monotonic()
        self._put(job, [job.places[place]], scored)
        self._settle(number)

    def _put(self, job: Job, places: Sequence[int], scored: Scored) -> None:
        for place in places:
            if job.scores[place] is None:
                job.scores[place] = scored

    def _settle(self, number: int) -> None:
        """A job whose scores are all there is done."""
        job = self._flying[number]
        if not job.open:
            del self._flying[number]
            job.future.set_result([score for score in job.scores if score is not None])

    def _late(self) -> None:
        """The process has passed its time: what it works at is a `timeout`, the rest goes to another process."""
        ready = self.process.ready if self.process is not None else {}
        room = self._setting.concurrency if ready.get("concurrent") else 1
        for job in list(self._flying.values()):
            late = job.open if ready.get("grouped") else job.open[: max(0, room)]
            room -= len(late)
            self._put(job, late, Scored(0.0, "timeout"))
        self._again()

    def _crashed(self, error: Exception) -> None:
        """The process is gone, or not to be trusted. What it worked at is tried twice."""
        process = self.process
        words = str(error)
        if (
            isinstance(error, EOFError | OSError)
            and not words
            and process is not None
            and not self._owner.closed.is_set()
        ):
            words = process.death()
        for job in self._flying.values():
            place = job.open[0]
            job.crashes[place] += 1
            if job.crashes[place] == 2:
                whole = process is not None and process.ready.get("grouped")
                state = "timeout" if isinstance(error, TimeoutError) else "error"
                self._put(job, job.open if whole else [place], Scored(0.0, state, f"the grading process died: {words}"))
        self._again()

    def _again(self) -> None:
        """Another process for what is left."""
        self._kill()
        flying, self._flying = self._flying, {}
        for number, job in flying.items():
            if job.open:
                self._owner.first(job)
            else:
                self._flying[number] = job
                self._settle(number)

    def _kill(self) -> None:
        process, self.process, self._loading = self.process, None, False
        if process is not None:
            process.close()

    def _fail_all(self, error: BaseException) -> None:
        flying, self._flying = self._flying, {}
        for job in flying.values():
            job.future.set_exception(error)
