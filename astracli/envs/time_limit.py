"""How long an Env's own code may take: what waits too long is cancelled, what blocks the event loop is interrupted.

The limit is on each stretch between two calls of the policy or the grader (`paused`), whose time is not the Env's.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType

CHECKS = 4
"""How often within the limit the event loop is asked whether it still runs."""


_blocked_s = 0.0
"""In which one Env kept the event loop from all others, until it was interrupted."""


def _time() -> float:
    """Seconds in which the event loop ran: what one Env blocked is not taken off the others' time."""
    return time.monotonic() - _blocked_s


class TooLong(Exception):
    """The Env's code used up its time. Its cause, or its traceback, says where."""


class limited:
    """An async context manager around code of an Env, in a task of its own. Raises TooLong.

    One timer for all stretches: it looks, when it comes, whether the present one is over its limit.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._since: float | None = None
        """When the present stretch began; None while it is paused."""
        self._paused = 0
        self._expired = False

    @property
    def words(self) -> str:
        return f"it took more than rollout.env_timeout_s = {self._limit_s:g} s outside of generation"

    async def __aenter__(self) -> None:
        self._loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._task = task
        self._since = _time()
        self._timer = self._loop.call_later(self._limit_s, self._look)
        self._before = _clock.set(self)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        _clock.reset(self._before)
        self._timer.cancel()
        if self._expired and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TooLong(self.words) from error

    def _look(self) -> None:
        passed = 0.0 if self._since is None else _time() - self._since
        left = self._limit_s - passed
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._expired = True
            self._task.cancel()

    def pause(self) -> None:
        self._paused += 1
        self._since = None

    def go_on(self) -> None:
        self._paused -= 1
        if not self._paused:
            self._since = _time()


_clock: ContextVar[limited | None] = ContextVar("astra_env_clock", default=None)
"""Of the Env's code that runs now, in tasks that it has started too."""


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Around what an Env waits for and is not its own doing; afterwards it has its whole time again."""
    clock = _clock.get()
    if clock is not None:
        clock.pause()
    try:
        yield
    finally:
        if clock is not None:
            clock.go_on()


class LoopWatch:
    """Interrupts an Env whose code does not give the event loop back (`time.sleep`, an endless loop). A context
    manager, around the event loop's work in the main thread.

    A thread asks the loop for a sign of life. Without one for `limit_s` seconds it sends SIGUSR2, whose handler raises
    TooLong where the main thread is, if that is code of an Env.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._closed = threading.Event()
        self._seen = 0.0

    def __enter__(self) -> LoopWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._interrupt)
            self._loop = asyncio.get_running_loop()
            self._sign()
            self._thread = threading.Thread(target=self._watch, name="env-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._closed.set()
            self._thread.join()
            signal.signal(signal.SIGUSR2, self._before)

    def _sign(self) -> None:
        self._seen = time.monotonic()

    def _watch(self) -> None:
        main, pause_s = threading.main_thread().ident, self._limit_s / CHECKS
        assert main is not None
        before = time.monotonic()
        while not self._closed.wait(pause_s):
            now = time.monotonic()
            if now - before > 2 * pause_s:  # this thread, too, stood still: the whole process did
                self._sign()
            elif now - self._seen > self._limit_s:
                signal.pthread_kill(main, signal.SIGUSR2)
            before = now
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._sign)

    def _interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        global _blocked_s
        clock, blocked_s = _clock.get(), time.monotonic() - self._seen
        if clock is not None and blocked_s > self._limit_s:
            _blocked_s += blocked_s
            self._sign()
            raise TooLong(clock.words)
