"""A thread with an event loop of its own, for calls that must not wait behind what the caller's loop does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class ControlThread:
    """Begins with its first call, and after `close` again."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def begun(self) -> bool:
        return self._loop is not None

    async def run(self, calls: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises. In the thread itself it runs at once. A caller that is cancelled cancels it,
        and waits for what it does then."""
        loop = self._running()
        if loop is asyncio.get_running_loop():
            return await calls
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(loop.create_task(calls))
            tasks[0].add_done_callback(lambda task: _pass_on(task, result))

        loop.call_soon_threadsafe(begin)
        waiting = asyncio.wrap_future(result)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            with suppress(Exception, asyncio.CancelledError):
                await asyncio.shield(waiting)
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="engine control", daemon=True)
                self._thread.start()
            return self._loop

    def close(self) -> None:
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _pass_on(task: asyncio.Task[T], result: Future[T]) -> None:
    if task.cancelled():
        result.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(task.result())
