"""Which ends of a trainer may pass: the run goes on from its checkpoint. The one place where that is decided.

A worker that meets an error which may pass ends with `EXIT`; one that a signal ends has no say, and is judged by the
signal. Everything else is the program's, the recipe's or the machine's for good, and would only happen again: bad
input, memory that the plan got wrong, a full disk, NaN, trainer and engine that disagree, an exception of Python's.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

EXIT = 75
"""Exit code of a worker whose error may pass (EX_TEMPFAIL of sysexits.h)."""
LINK = "the link to another rank failed"
"""How a rank begins to say that another one is gone: that one's end is the cause."""
LASTING = (
    *("no kernel image", "invalid device function", "invalid argument", "invalid configuration", "invalid ptx"),
    *(
        "unsupported ptx",
        "unsupported toolchain",
        "illegal instruction",
        "device-side assert",
        "named symbol not found",
    ),
    *("invalid device ordinal", "no cuda-capable device", "driver version is insufficient", "not supported"),
    *("not_supported", "invalid_value", "arch_mismatch", "too many resources requested", "misaligned address"),
)
"""Of what a GPU reports, in lower case: a program that it cannot run, or that asks for what is not there."""
LINKS = (
    *("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "socket timeout"),
    *(
        "timed out waiting",
        "connection refused",
        "ncclremoteerror",
        "remote process exited",
        "heartbeat monitor timed out",
    ),
    *("collective operation timeout",),
)
"""Of what a collective raises when a rank is gone, or does not come."""
SIGNALS = {
    signal.SIGKILL: "killed from outside, or by the system for want of memory",
    signal.SIGABRT: "ended by a library: NCCL does so after a collective that timed out",
    signal.SIGSEGV: "ended inside a library",
    signal.SIGBUS: "ended inside a library",
}
"""What ends a process that may do better the next time."""


def of_gpu(said: str) -> bool:
    """Whether an error that a GPU or NCCL reported may pass: a fault of the device, the link or a race."""
    low = said.lower()
    return not any(words in low for words in LASTING)


def of_link(error: BaseException) -> bool:
    """Whether a collective failed because of another rank. By words and class name: torch is not imported here."""
    low = f"{type(error).__name__}: {error}".lower()
    distributed = type(error).__module__.startswith("torch") or "gloo" in low or "nccl" in low
    return distributed and any(words in low for words in LINKS)


def cause(code: int | None, lines: Sequence[str]) -> str | None:
    """Why a process that ended with `code` (None: it fell silent and was ended) may do better the next time, from its
    last lines; None when it may not."""
    if code is None:
        return "it hung"
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == EXIT:
        return said[-1] if said else "an error that may pass"
    if code < 0 and -code in SIGNALS:
        return _timeout(lines) or SIGNALS[signal.Signals(-code)]
    return None


def secondary(why: str) -> bool:
    """Whether a rank only noticed the end of another one."""
    return why.startswith(LINK)


def _timeout(lines: Sequence[str]) -> str | None:
    """A line in which NCCL says that a collective timed out; it then aborts the process."""
    found = [line for line in lines if "nccl" in line.lower() and ("timeout" in line.lower() or "timed out" in line)]
    return f"a collective between GPUs timed out: {found[0].strip()[:200]}" if found else None
