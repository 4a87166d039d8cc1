"""Rewards: a pool of grading processes that are killed when an answer takes too long.

A pathological answer costs its own time limit and nothing else: its verdict is `timeout`, and what stood behind it in
the batch is graded by a fresh process. Errors are counted apart from wrong answers. See `grade_worker` for the other
side of the pipe and `grader` for the rules of mathematics.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from typing import TYPE_CHECKING, Any, cast

import msgpack

from astracli.errors import RunFailed, UserError

if TYPE_CHECKING:
    from astracli.rl.types import Verdict

BUILTIN = ("math", "math_boxed", "number", "probe")
"""`math`: the last box, else the last number. `math_boxed`: only a box counts. `number`: the last number as written.
`probe`: see `probe_rewards`."""
_BATCH = 64
_START_S = 60.0
"""How long a worker may take to start, or to import what it grades with."""


@dataclass(frozen=True)
class GradeItem:
    problem: str
    answer: str
    """The gold answer."""
    text: str
    """The completion, decoded."""
    tokens: Sequence[int] | None = None
    """Token ids of the completion; only `probe` looks at them."""


@dataclass(frozen=True)
class Grade:
    reward: float
    verdict: Verdict
    """`right` means a reward above 0."""
    detail: str = ""
    """What went wrong, when the verdict is `error`."""


class GradePool:
    """Grades completions in `workers` processes; one item may take `timeout_s` seconds.

    `grading` is the recipe's table `data.grading`, for the rewards of mathematics.
    Processes start when the first batch needs them. Thread-safe. A context manager; `close` kills the processes.
    Raises UserError at the first grading when `spec` is no reward (`validate_reward` finds out before a run starts).
    """

    def __init__(
        self, spec: str = "math", workers: int = 1, timeout_s: float = 5.0, grading: Mapping[str, Any] | None = None
    ):
        self._spec = spec
        self._timeout_s = timeout_s
        self._workers = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(spec, timeout_s, dict(grading or {})) for _ in range(workers)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grade")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        """Gradings by verdict since the pool was made."""

    def __enter__(self) -> GradePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; what is being graded fails with RunFailed."""
        self._closed.set()
        for worker in self._all:
            worker.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.kill()

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One grade per item, in order. With `probe`, which compares samples, the items are one group."""
        return [grade for part in self._submit(items) for grade in part.result()]

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """`grade` for asyncio: the loop goes on meanwhile."""
        parts = await asyncio.gather(*(asyncio.wrap_future(part) for part in self._submit(items)))
        return [grade for part in parts for grade in part]

    def _submit(self, items: Sequence[GradeItem]) -> list[Future[list[Grade]]]:
        if self._closed.is_set():
            raise RunFailed("the grading processes are closed")
        if self._spec == "probe":
            done: Future[list[Grade]] = Future()
            done.set_result(self._count(probe_grades(items)))
            return [done]
        size = max(1, min(_BATCH, -(-len(items) // self._workers)))
        return [self._threads.submit(self._grade_batch, items[i : i + size]) for i in range(0, len(items), size)]

    def _grade_batch(self, items: Sequence[GradeItem]) -> list[Grade]:
        worker = self._idle.get()
        try:
            return self._count(self._run(worker, items))
        finally:
            self._idle.put(worker)

    def _run(self, worker: _Worker, items: Sequence[GradeItem]) -> list[Grade]:
        """Grade all, starting the process again after a time limit or a crash. A crash is tried twice."""
        grades: list[Grade] = []
        crashes: Counter[int] = Counter()
        while len(grades) < len(items):
            if self._closed.is_set():
                raise RunFailed("the grading processes are closed")
            rest = items[len(grades) :]
            try:
                for frame in worker.grade(rest):
                    grades.append(Grade(float(frame[0]), frame[1], frame[2]))
            except TimeoutError:
                worker.kill()
                grades.append(Grade(0.0, "timeout"))
            except (EOFError, OSError) as error:
                worker.kill()
                crashes[len(grades)] += 1
                if crashes[len(grades)] == 2:
                    grades.append(Grade(0.0, "error", f"the grading process died: {error}"))
        return grades

    def _count(self, grades: list[Grade]) -> list[Grade]:
        with self._lock:
            self.counts.update(grade.verdict for grade in grades)
        return grades


class _Worker:
    """One grading process: started when needed, killed when it must be. Used by one thread at a time."""

    def __init__(self, spec: str, timeout_s: float, grading: dict[str, Any]):
        self._hello: dict[str, Any] = {"spec": spec, "timeout_s": timeout_s, "grading": grading}
        self._process: subprocess.Popen[bytes] | None = None

    def grade(self, items: Sequence[GradeItem]) -> Any:
        """Yield one [reward, verdict, detail] per item. Raises TimeoutError on an item's limit, EOFError on a crash."""
        if self._process is None:
            self.start()
        self._send({"items": [[item.problem, item.answer, item.text] for item in items]})
        limit_s = self._hello["timeout_s"]
        for _ in items:
            frame = self._receive(limit_s)
            if frame[0] == "loading":
                self._receive(_START_S)
                frame = self._receive(limit_s)
            yield frame

    def interrupt(self) -> None:
        """SIGKILL from any thread; the one that uses this worker reads the end of its pipe."""
        process = self._process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        self.interrupt()
        process, self._process = self._process, None
        if process is None:
            return
        process.wait()
        self._pipe.close()

    def start(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "astracli.rewards.grade_worker", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # a reward may print
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        try:
            self._send(self._hello)
            frame = self._receive(_START_S)
        except TimeoutError:
            ending = f"did not start in {_START_S:g} s"
        except (EOFError, ConnectionError) as error:
            ending = f"died while it started: {error}"
        else:
            if frame[0] != "refused":
                return
            self.kill()
            raise UserError(frame[1], frame[2])
        self.kill()
        raise RunFailed(f"a grading process for reward `{self._hello['spec']}` {ending}")

    def _send(self, document: dict[str, Any]) -> None:
        self._pipe.send_bytes(msgpack.packb(document, unicode_errors="surrogatepass"))

    def _receive(self, limit_s: float) -> Any:
        """The next frame. Raises TimeoutError after `limit_s` seconds, EOFError when the process is gone."""
        try:
            if not self._pipe.poll(limit_s):
                raise TimeoutError
            return msgpack.unpackb(self._pipe.recv_bytes(), unicode_errors="surrogatepass")
        except (EOFError, ConnectionError):
            process = cast(subprocess.Popen[bytes], self._process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)  # its end of the pipe closes a moment before it can be reaped
            raise EOFError(f"exit code {process.returncode}") from None


def probe_grades(items: Sequence[GradeItem]) -> list[Grade]:
    """A reward for checking the machinery with any model: 1 where the share of even token ids is at or over the median.

    About half of any group with different completions gets it, whatever the model says. Items are one group; needs
    `tokens`.
    """
    shares = []
    for item in items:
        if item.tokens is None:
            raise ValueError("reward `probe` needs the completion's token ids")
        shares.append(sum(int(token) % 2 == 0 for token in item.tokens) / max(1, len(item.tokens)))
    median = statistics.median(shares) if shares else 0.0
    return [Grade(1.0, "right") if share >= median else Grade(0.0, "wrong") for share in shares]


def validate_reward(spec: str) -> None:
    """Raises UserError when a recipe's `data.reward` is no reward. A module of the user's is imported in a process."""
    if spec in BUILTIN:
        return
    worker = _Worker(spec, 0.0, {})
    try:
        worker.start()
    except RunFailed as error:
        raise UserError(error.message, "see what its module does while it is imported") from None
    finally:
        worker.kill()
