"""The process that grades and may be killed: `python -m astracli.rewards.grade_worker FD`, the fd of a `Connection`.

Messages are msgpack. In: {"spec", "timeout_s", "grading"} once, then {"items": [[problem, answer, text], ...]} any
number of times. Out: ["ready"] or ["refused", message, hint]; then for every item, in order, [reward, verdict, detail];
["loading"] and ["loaded"] stand around a slow import, whose time belongs to no item. The process ends when the other
side closes the connection.

It starts in well under a second: no torch, no numpy, and math-verify only once an answer needs it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from typing import Any, cast

import msgpack

from astracli.errors import AstraError, UserError
from astracli.rewards import grader
from astracli.rewards.grading import algebra
from astracli.rewards.grading.conventions import DEFAULTS, Conventions
from astracli.rewards.reward import BUILTIN

Frame = list[object]
Score = Callable[[str, str, str], float]

ENTRY_POINT_GROUP = "astra.rewards"
EXTRACTIONS: dict[str, grader.Extraction] = {"math": "boxed_or_last_number", "math_boxed": "boxed"}
"""Built-in rewards of this process: name -> where the answer is read."""
_ADDRESS_SPACE_BYTES = 4 << 30
"""Bound for mathematics, where a short answer such as 9^9^9^9 can ask for any amount of memory."""


def load_reward(spec: str) -> Score:
    """A reward of the user's: `pkg.module:function`, or a name from the entry-point group `astra.rewards`.

    The function takes (problem, answer, completion) and returns a number. Raises UserError.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    function = _imported(spec) if ":" in spec else _installed(spec)
    if not callable(function):
        raise UserError(f"reward `{spec}` is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind("problem", "answer", "completion")
    except TypeError as error:
        raise UserError(
            f"reward `{spec}` cannot be called with (problem, answer, completion): {error}",
            "define it as `def reward(problem: str, answer: str, completion: str) -> float`",
        ) from None
    except ValueError:
        pass  # a builtin without a signature
    return cast(Score, function)


def _imported(spec: str) -> object:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UserError(f"reward `{spec}` is not of the form `pkg.module:function`")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"reward `{spec}`: importing `{module_name}` failed: {type(error).__name__}: {error}",
            "install the package into this environment, or run where the module lies",
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"reward `{spec}`: `{module_name}` has no `{attribute}`")
        found = getattr(found, part)
    return found


def _installed(name: str) -> object:
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in points:
        try:
            return cast(object, points[name].load())
        except Exception as error:
            raise UserError(f"reward `{name}` ({points[name].value}) failed to load: {error!r}") from None
    import difflib

    known = sorted({*BUILTIN, *points})
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean `{near[0]}`? " if near else ""
    raise UserError(
        f"there is no reward `{name}`: {', '.join(f'`{k}`' for k in known)}",
        f"{meant}your own is `pkg.module:function` or an entry point in the group `{ENTRY_POINT_GROUP}`",
    )


def grade_one(
    spec: str,
    score: Score | None,
    item: list[str],
    send: Callable[[Frame], None],
    conventions: Conventions = DEFAULTS,
) -> Frame:
    """[reward, verdict, detail] of one item. An exception of the reward is the verdict `error`."""
    problem, answer, text = item
    if score is not None:
        try:
            reward = float(score(problem, answer, text))
        except Exception as error:
            return [0.0, "error", f"{type(error).__name__}: {error}"]
        if not math.isfinite(reward):
            return [0.0, "error", f"the reward is {reward}"]
        return [reward, "right" if reward > 0 else "wrong", ""]
    if spec == "number":
        literal = grader.grade_number(answer, text)
        return [1.0 if literal == "right" else 0.0, literal, ""]
    extraction = EXTRACTIONS[spec]
    verdict = grader.quick(answer, text, extraction)
    if verdict is None:
        algebra.on_import = lambda state: send([state])
        try:
            verdict = grader.thorough(answer, text, extraction, problem, conventions)
        except Exception as error:
            return [0.0, "error", f"{type(error).__name__}: {error}"]
    return [1.0 if verdict == "right" else 0.0, verdict, ""]


def serve(pipe: Connection) -> None:
    def send(frame: Frame) -> None:
        pipe.send_bytes(msgpack.packb(frame, unicode_errors="surrogatepass"))

    documents = _documents(pipe)
    hello = next(documents, None)
    if hello is None:
        return
    spec, timeout_s = str(hello["spec"]), float(hello["timeout_s"])
    conventions = Conventions(**hello["grading"])
    try:
        score = None if spec in BUILTIN else load_reward(spec)
    except AstraError as error:
        send(["refused", error.message, error.hint])
        return
    if score is None:
        _limit_memory()
    send(["ready"])
    for batch in documents:
        for item in batch["items"]:
            # The one who started this process kills it in time. Should he be gone, the kernel does.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 60.0)
            send(grade_one(spec, score, item, send, conventions))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _documents(pipe: Connection) -> Iterator[dict[str, Any]]:
    with suppress(EOFError, ConnectionError):
        while True:
            yield msgpack.unpackb(pipe.recv_bytes(), unicode_errors="surrogatepass")


def _limit_memory() -> None:
    import resource

    with suppress(OSError, ValueError):  # some platforms do not have this limit
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))


def main() -> None:
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
