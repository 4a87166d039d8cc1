"""The process that grades and may be killed: `python -m astracli.rewards.grade_worker FD`, the fd of its socket.

In: a hello (`grade_process.Process.start`) once, then {"job", "items"} any number of times. Out: ["ready", {...}] or
["refused", message, hint]; then for every item [job, place, *Scored]; ["loading"] and ["loaded"] stand around a slow
import, whose time belongs to no item. Items are graded in order, those of an `async def` side by side. The process ends
when the other side closes the socket; it runs in a sandbox (`process.sandbox`), which ends it when its owner is gone.

It starts in well under a second: no torch, no numpy, and math-verify only once an answer needs it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from astracli.errors import UserError
from astracli.rewards import grader, scores
from astracli.rewards.binding import Binding, bind
from astracli.rewards.builtin import BUILTIN, CODE, MATH
from astracli.rewards.channel import WorkerEnd
from astracli.rewards.grading import algebra
from astracli.rewards.grading.conventions import DEFAULTS, Conventions
from astracli.rewards.loading import load_reward
from astracli.rewards.scores import Scored
from astracli.rewards.trl import Log
from astracli.rewards.types import GradeItem, NoScoreError

EXTRACTIONS: dict[str, grader.Extraction] = {"math": "boxed_or_last_number", "math_boxed": "boxed"}
"""Built-in rewards of this process: name -> where the answer is read."""
Send = Callable[[Sequence[object]], None]


def grade_math(
    spec: str,
    item: Sequence[str],
    send: Send,
    conventions: Conventions = DEFAULTS,
    before_slow: Callable[[], None] = lambda: None,
) -> Scored:
    """`math`, `math_boxed` or `number` of [problem, answer, completion]. `before_slow` is called before what may never
    return."""
    problem, answer, text = item
    if spec == "number":
        literal = grader.grade_number(answer, text)
        return Scored(1.0 if literal == "right" else 0.0, literal)
    extraction = EXTRACTIONS[spec]
    verdict = grader.quick(answer, text, extraction)
    if verdict is None:
        before_slow()
        algebra.on_import = lambda state: send([state])
        try:
            verdict = grader.thorough(answer, text, extraction, problem, conventions)
        except Exception as error:
            return scores.failed(error)
    return Scored(1.0 if verdict == "right" else 0.0, verdict)


class _Ours:
    """A reward of the user's, called one item or one group at a time."""

    def __init__(self, binding: Binding):
        self.binding = binding

    def grade(self, items: Sequence[GradeItem]) -> Iterator[Scored]:
        """A score for every item, in order. An exception of the reward is the verdict `error`."""
        if self.binding.grouped:
            log, count = Log(len(items)), len(items)
            yield from self._guarded(lambda: scores.many(self.binding, self._call(items, 0, log), count, log), count)
            return
        for place in range(len(items)):
            yield from self._guarded(partial(self._one, items, place), 1)

    def _one(self, items: Sequence[GradeItem], place: int) -> list[Scored]:
        return [scores.one(self.binding, self._call(items, place))]

    def _call(self, items: Sequence[GradeItem], place: int, log: Log | None = None) -> Any:
        returned = self.binding.call(items, place, log)
        if inspect.isawaitable(returned):  # a plain function around an `async def`

            async def awaited() -> Any:
                return await returned

            return asyncio.run(awaited())
        return returned

    def _guarded(self, call: Callable[[], list[Scored]], count: int) -> list[Scored]:
        try:
            return call()
        except BaseException as error:  # SystemExit too: a reward that calls sys.exit has failed
            return [scores.failed(error)] * count


class _Concurrent:
    """An `async def` reward: up to `concurrency` calls at once, on one event loop."""

    def __init__(self, binding: Binding, concurrency: int, timeout_s: float, send: Send):
        self._binding, self._timeout_s, self._send = binding, timeout_s, send
        self._free = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, channel: WorkerEnd) -> None:
        jobs: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def read() -> None:
            while True:
                try:
                    document = channel.receive()
                except (EOFError, OSError):
                    document = None
                loop.call_soon_threadsafe(jobs.put_nowait, document)
                if document is None:
                    return

        threading.Thread(target=read, name="jobs", daemon=True).start()
        while (document := await jobs.get()) is not None:
            items = [GradeItem(*fields) for fields in document["items"]]
            for place in [0] if self._binding.grouped else range(len(items)):
                task = asyncio.create_task(self._grade(document["job"], items, place))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _grade(self, job: int, items: Sequence[GradeItem], place: int) -> None:
        count, log = len(items) if self._binding.grouped else 1, Log(len(items))
        async with self._free:
            try:
                async with asyncio.timeout(self._timeout_s * count) as limit:
                    returned = await self._binding.call(items, place, log)
                found = (
                    scores.many(self._binding, returned, count, log)
                    if self._binding.grouped
                    else [scores.one(self._binding, returned)]
                )
            except TimeoutError as error:
                found = [Scored(0.0, "timeout") if limit.expired() else scores.failed(error)] * count
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                found = [scores.failed(error)] * count
        for offset, scored in enumerate(found):
            self._send([job, place + offset, *scored])


def serve(channel: WorkerEnd) -> None:
    try:
        hello = channel.receive()
    except EOFError:
        return
    spec, timeout_s, send = str(hello["spec"]), float(hello["timeout_s"]), channel.send
    try:
        binding = (
            None if spec in BUILTIN else bind(spec, load_reward(spec), hello["columns"], hello["where"], hello["asked"])
        )
        maximum = 1.0 if binding is None else _maximum(spec, binding)
    except UserError as error:
        if error.__cause__ is not None:
            print(scores.failed(error.__cause__).detail, file=sys.stderr, flush=True)
        send(["refused", error.message, error.hint])
        return
    send(["ready", ready(spec, binding, maximum)])
    if binding is not None and binding.concurrent:
        asyncio.run(_concurrent(binding, int(hello["concurrency"]), timeout_s, channel))
        return
    grade = _of_kind(spec, binding, hello, channel)
    tell = channel.hold if spec in MATH else send
    with suppress(EOFError, ConnectionError):
        while True:
            document = channel.receive()
            for place, scored in enumerate(grade(document["items"])):
                tell([document["job"], place, *scored])
            channel.flush()


async def _concurrent(binding: Binding, concurrency: int, timeout_s: float, channel: WorkerEnd) -> None:
    await _Concurrent(binding, concurrency, timeout_s, channel.send).serve(channel)
    os._exit(0)


def _of_kind(
    spec: str, binding: Binding | None, hello: Mapping[str, Any], channel: WorkerEnd
) -> Callable[[Sequence[Sequence[Any]]], Iterator[Scored]]:
    """What grades the items of a job, in order."""
    if binding is not None:
        ours = _Ours(binding)
        return lambda items: ours.grade([GradeItem(*fields) for fields in items])
    if spec in CODE:
        return lambda items: (_code(spec, GradeItem(*fields), hello) for fields in items)
    conventions = Conventions(**hello["grading"])
    return lambda items: (grade_math(spec, item, channel.send, conventions, channel.flush) for item in items)


def _code(spec: str, item: GradeItem, hello: Mapping[str, Any]) -> Scored:
    from astracli.rewards import code

    try:
        return code.score(spec, item, hello["code"], float(hello["timeout_s"]))
    except (NoScoreError, OSError) as error:
        return scores.failed(error)


def _maximum(spec: str, binding: Binding) -> float:
    """The largest value of a reward, from its attribute `maximum`."""
    declared = getattr(binding.function, "maximum", 1.0)
    if isinstance(declared, bool) or not isinstance(declared, int | float):
        raise UserError(f"reward `{spec}`: its attribute `maximum` is {declared!r}, not a number")
    return float(declared)


def ready(spec: str, binding: Binding | None, maximum: float) -> dict[str, Any]:
    """What the owner has to know of a reward: what to send, and how long to wait."""
    if binding is None:
        code = spec in CODE
        needs = ["row"] if code else []
        return {"needs": needs, "sees_group": False, "grouped": False, "concurrent": False, "maximum": maximum}
    return {
        "needs": binding.needs,
        "sees_group": binding.sees_group,
        "grouped": binding.grouped,
        "concurrent": binding.concurrent,
        "maximum": maximum,
    }


def main() -> None:
    serve(WorkerEnd(int(sys.argv[1])))
    os._exit(0)  # threads of a reward may never end


if __name__ == "__main__":
    main()
