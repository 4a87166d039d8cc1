"""The processes that compute one reward: started when needed, killed when an answer takes too long.

Each process has a thread, a `_Driver`, that takes jobs (some samples of one prompt) from a queue, sends them and reads
the scores. A process of an `async def` has several jobs at once, any other has one.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from astracli.errors import RunFailed, UserError
from astracli.process.sandbox import Limits, Sandbox
from astracli.rewards.builtin import BUILTIN, CODE, MATH
from astracli.rewards.channel import GarbledError, OwnerEnd
from astracli.rewards.scores import DETAIL_CHARACTERS, MOST_PARTS, Scored, printable
from astracli.rewards.types import GradeItem

MATH_MEMORY_BYTES = 4 << 30
"""Bound for mathematics, where a short answer such as 9^9^9^9 can ask for any amount of memory."""
_BATCH = 64
_SEND_S = 10.0
"""At most so long a process may not take what it is sent, where `timeout_s` is longer or there is none."""
_LOOP_S = 2.0
"""Beside `timeout_s`, for an event loop to end a call by itself; then it is blocked."""
_STATES = frozenset({"scored", "right", "wrong", "no_answer", "timeout", "error", "absent"})


@dataclass(frozen=True)
class RewardSetting:
    """One reward of a run and what it may use."""

    spec: str
    name: str = ""
    weight: float = 1.0
    timeout_s: float = 5.0
    start_s: float = 60.0
    concurrency: int = 16
    maximum: float | None = None
    """None: what the reward declares."""
    memory_bytes: int | None = None
    grading: Mapping[str, Any] = field(default_factory=dict)
    """The table `data.grading`, for mathematics."""
    code: Mapping[str, Any] = field(default_factory=lambda: CODE_LIMITS)
    """The table `data.code`."""

    @property
    def limits(self) -> Limits:
        memory = MATH_MEMORY_BYTES if self.spec in MATH else self.memory_bytes
        return Limits(memory_bytes=memory)


CODE_LIMITS: dict[str, Any] = {"tests": "tests", "memory_gib": 1.0, "file_mb": 16.0, "processes": 16}


@dataclass
class _Job:
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


class Process:
    """One grading process, as its owner sees it. `kill` may be called from any thread."""

    def __init__(self, setting: RewardSetting, columns: Sequence[str] | None = None, where: str = "the data"):
        """Raises UserError when the process refuses the reward, RunFailed when it does not start."""
        self._setting = setting
        ours, theirs = socket.socketpair()
        self.channel = OwnerEnd(ours)
        command = [sys.executable, "-P", "-m", "astracli.rewards.grade_worker", str(theirs.fileno())]
        with theirs:
            self.sandbox = Sandbox(
                command,
                limits=setting.limits,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a reward may print
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.ready: Mapping[str, Any] = {}
        self._columns, self._where = columns, where

    def start(self) -> None:
        setting = self._setting
        hello = {
            "spec": setting.spec,
            "timeout_s": setting.timeout_s,
            "concurrency": setting.concurrency,
            "grading": dict(setting.grading),
            "code": dict(setting.code),
            "columns": None if self._columns is None else list(self._columns),
            "where": self._where,
        }
        try:
            self.channel.send(hello, setting.start_s)
            frame = self.channel.receive(setting.start_s)
        except TimeoutError:
            ending = f"did not start in {setting.start_s:g} s"
        except (EOFError, OSError):
            ending = f"died while it started: {self.death()}"
        except GarbledError as error:
            ending = f"wrote something else than it should while it started: {error}"
        else:
            if isinstance(frame, list) and len(frame) == 3 and frame[0] == "refused":
                raise UserError(str(frame[1]), None if frame[2] is None else str(frame[2]))
            if isinstance(frame, list) and len(frame) == 2 and frame[0] == "ready" and isinstance(frame[1], dict):
                self.ready = frame[1]
                return
            ending = "wrote something else than it should while it started"
        raise RunFailed(f"a grading process for reward `{setting.spec}` {ending}")

    def death(self) -> str:
        """How it ended, after its socket closed."""
        ending = self.sandbox.wait(2.0)
        return "it closed its socket" if ending is None else str(ending)

    def kill(self) -> None:
        self.sandbox.kill()

    def close(self) -> None:
        self.kill()
        self.channel.close()


class Graders:
    """`workers` processes for one reward. Thread-safe."""

    def __init__(self, setting: RewardSetting, workers: int):
        self.setting = setting
        self._jobs: deque[_Job] = deque()
        self._known: Mapping[str, Any] | None = None
        if setting.spec in BUILTIN:
            self._known = {"sees_group": False, "maximum": 1.0}
        self.closed = threading.Event()
        self._drivers = [_Driver(self, number) for number in range(workers)]

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
            jobs.append(_Job(some, Future(), [None] * len(some)))
        self._jobs.extend(jobs)
        for driver in self._drivers:
            driver.wake()
        return [job.future for job in jobs]

    def take(self) -> _Job | None:
        """The next job that somebody still waits for."""
        with suppress(IndexError):
            while True:
                job = self._jobs.popleft()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    return job
        return None

    def first(self, job: _Job) -> None:
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


class _Driver:
    """The thread of one process."""

    def __init__(self, owner: Graders, number: int):
        self._owner, self._setting = owner, owner.setting
        self.process: Process | None = None
        self._flying: dict[int, _Job] = {}
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

    def _send(self, job: _Job) -> None:
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
        job_items = [_fields(job.items[place], needs) for place in places]
        job.places = list(places)
        try:
            self.process.channel.send({"job": number, "items": job_items}, min(self._setting.timeout_s, _SEND_S))
        except TimeoutError:
            self._crashed(TimeoutError("it does not read what it is sent"))
            return
        if len(self._flying) == 1:
            self._progress = time.monotonic()

    def _start(self) -> None:
        process = self.process = Process(self._setting)
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
        found = _scored(frame)
        job = self._flying.get(found[0]) if found is not None else None
        if found is None or job is None or not 0 <= found[1] < len(job.places):
            self._crashed(GarbledError("it wrote something that is no grade to its owner's socket"))
            return
        number, place, scored = found
        self._progress = time.monotonic()
        self._put(job, [job.places[place]], scored)
        self._settle(number)

    def _put(self, job: _Job, places: Sequence[int], scored: Scored) -> None:
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


def _fields(item: GradeItem, needs: Sequence[str]) -> tuple[Any, ...]:
    """An item as it travels: the three texts, and what the reward needs besides."""
    if not needs:
        return (item.problem, item.answer, item.text)
    return (
        item.problem,
        item.answer,
        item.text,
        list(map(int, item.tokens or ())) if "tokens" in needs else None,
        tuple(item.messages) if "messages" in needs else (),
        dict(item.row) if "row" in needs else {},
    )


def _scored(frame: object) -> tuple[int, int, Scored] | None:
    """(job, place, score) of a frame; None when it is no such thing."""
    if not isinstance(frame, list) or len(frame) != 6:
        return None
    number, place, reward, state, detail, logged = frame
    if type(number) is not int or type(place) is not int or type(reward) not in (float, int) or state not in _STATES:
        return None
    if type(detail) is not str or not isinstance(logged, dict) or len(logged) > MOST_PARTS:
        return None
    if not all(type(key) is str and type(value) is float for key, value in logged.items()):
        return None
    return number, place, Scored(float(reward), state, printable(detail[: 2 * DETAIL_CHARACTERS]), logged)
