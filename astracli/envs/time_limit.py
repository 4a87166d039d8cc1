"""How long an Env's own code may take: what waits too long is cancelled, what blocks the event loop is interrupted.

The limit is on each stretch between two calls of the policy or the grader (`paused`), whose time is not the Env's.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from types import FrameType

CHECKS = 4
"""How often within the limit the event loop is asked whether it still runs."""


class TooLong(Exception):
    """The Env's code used up its time. Its cause, or its traceback, says where."""


class _Clock:
    def __init__(self, limit_s: float, timeout: asyncio.Timeout):
        self._limit_s, self._timeout, self._paused = limit_s, timeout, 0

    @property
    def words(self) -> str:
        return f"it took more than rollout.env_timeout_s = {self._limit_s:g} s outside of generation"

    def pause(self) -> None:
        self._paused += 1
        self._set(None)

    def go_on(self) -> None:
        self._paused -= 1
        if not self._paused:
            self._set(asyncio.get_running_loop().time() + self._limit_s)

    def _set(self, when: float | None) -> None:
        with contextlib.suppress(RuntimeError):  # it has run out already
            self._timeout.reschedule(when)


_clock: ContextVar[_Clock | None] = ContextVar("astra_env_clock", default=None)
"""Of the Env's code that runs now, in tasks that it has started too."""


@contextlib.asynccontextmanager
async def limited(limit_s: float) -> AsyncIterator[None]:
    """Around code of an Env, in a task of its own. Raises TooLong."""
    timeout = asyncio.timeout(limit_s)
    clock = _Clock(limit_s, timeout)
    token = _clock.set(clock)
    try:
        async with timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise TooLong(clock.words) from error.__cause__
    finally:
        _clock.reset(token)


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
        clock = _clock.get()
        if clock is not None and time.monotonic() - self._seen > self._limit_s:
            raise TooLong(clock.words)
