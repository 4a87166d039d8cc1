"""What a chat template may take: it is code that comes with a checkpoint.

transformers renders templates in jinja2's sandbox: files, modules and attributes that lead out of it are out of reach.
But only `range` is bounded there. A template can loop in loops, or double a text until memory is gone. So the first
rendering of a kind of prompt happens in a fork of this process, under limits; what ended there is then done here. Later
ones of the kind have a limit of time (in the main thread), and none of memory.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from astracli.config import reading
from astracli.errors import UserError

CPU_S = 10
"""Of one rendering, which takes a millisecond."""
MEMORY_BYTES = 1 << 30
"""That a rendering may add."""
MOST_CHARACTERS = 16 << 20
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a checkpoint's chat template may be, in the order in which they count."""
_WAIT_S = 120.0
"""For the fork, which may get no CPU time for long."""
_MEMORY, _LENGTH = 3, 4
"""Exit codes of the fork."""
_ended: set[tuple[object, ...]] = set()
"""Kinds of prompts whose rendering has ended in a fork."""


class TooMuch(UserError):
    """A chat template passed a limit."""


def applied(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text that a tokenizer's chat template makes of some turns. Raises TooMuch, and what the template raises."""
    turns = list(messages)
    roles = tuple(sorted({str(turn.get("role")) for turn in turns}))

    def render() -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))

    kind = (str(tokenizer.chat_template), roles, bool(options.get("tools")), options.get("add_generation_prompt"))
    reason = None if kind in _ended else _tried(render)
    if reason is None:
        _ended.add(kind)
        try:
            with _time_limit():
                text = render()
        except _TimeIsUp:
            reason = _more_than("time")
        else:
            reason = _more_than("length") if len(text) > MOST_CHARACTERS else None
    if reason is not None:
        file = _file(Path(str(getattr(tokenizer, "name_or_path", ""))))
        raise TooMuch(
            f"the chat template in `{file}` does not render a prompt ({', '.join(roles)}): {reason}",
            "nothing but a broken or a hostile template needs that: take the checkpoint from its makers",
        )
    return text


def _more_than(limit: str) -> str:
    said = {
        "time": f"takes more than {CPU_S} s of CPU time",
        "memory": f"takes more than {MEMORY_BYTES >> 20} MiB of memory",
        "length": f"writes more than {MOST_CHARACTERS:,} characters",
    }
    return f"it {said[limit]}"


def _file(folder: Path) -> Path:
    """The file of a checkpoint that its chat template is in."""
    return next((folder / name for name in FILES if reading.is_file(folder / name)), folder)


def _tried(render: Callable[[], str]) -> str | None:
    """Why a rendering does not end within the limits, tried in a fork; None when it does, or raises."""
    try:
        pid = os.fork()
    except OSError:  # no room for another process: here, it has a limit of time
        return None
    if not pid:
        _in_fork(render)
    status = _waited(pid)
    if status is None:
        return f"it has not ended after {_WAIT_S:g} s"
    code = os.waitstatus_to_exitcode(status)
    known = {_MEMORY: "memory", _LENGTH: "length", -signal.SIGXCPU: "time", -signal.SIGKILL: "memory"}
    if code in known:
        return _more_than(known[code])
    return f"it ends its process ({code})" if code else None


def _in_fork(render: Callable[[], str]) -> NoReturn:
    """The whole life of the forked process."""
    code = _MEMORY
    try:
        signal.set_wakeup_fd(-1)  # the parent's event loop reads from it
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGVTALRM):
            signal.signal(number, signal.SIG_DFL)
        limits = {resource.RLIMIT_CPU: CPU_S, resource.RLIMIT_CORE: 0}
        with contextlib.suppress(OSError):  # only Linux says it
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits[resource.RLIMIT_AS] = held + MEMORY_BYTES
        for limit, value in limits.items():
            with contextlib.suppress(OSError, ValueError):  # a lower limit is there
                resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        code = _LENGTH if len(render()) > MOST_CHARACTERS else 0
    except MemoryError:
        pass
    except BaseException:  # what the template raises, it raises again where somebody hears it
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's is to be closed or flushed


def _waited(pid: int) -> int | None:
    """The status with which a fork has ended; None when it had to be killed."""
    deadline, pause = time.monotonic() + _WAIT_S, 0.0005
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


class _TimeIsUp(Exception):
    """Only in `_time_limit`."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """CPU time of this process; in another thread than the main one, none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
