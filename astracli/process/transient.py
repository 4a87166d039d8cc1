"""Which failures of a trainer may pass, so that the run goes on from its checkpoint. The one place that decides this.

A worker whose error may pass ends with `EXIT`; a worker that a signal ended is judged by the signal. Every other
failure would happen again: bad input, memory that the plan got wrong, a full disk, NaN, a trainer and an engine that
disagree, an exception of Python's.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from astracli.errors import RunFailed

EXIT = 75
"""Exit code of a worker whose error may pass (EX_TEMPFAIL of sysexits.h)."""
LINK = "the link to another rank failed"
"""How the error of a rank begins that lost another one: the end of the other rank is the cause."""
LASTING = (
    "no kernel image", "invalid device function", "invalid argument", "invalid configuration", "invalid ptx",
    "unsupported ptx", "unsupported toolchain", "illegal instruction", "device-side assert", "named symbol not found",
    "invalid device ordinal", "no cuda-capable device", "driver version is insufficient", "not supported",
    "not_supported", "invalid_value", "arch_mismatch", "too many resources requested", "misaligned address",
)  # fmt: skip
"""Words in errors of a GPU, in lower case: it cannot run the program, or lacks what the program asks for."""
LINKS = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "socket timeout",
    "timed out waiting", "connection refused", "ncclremoteerror", "remote process exited",
    "heartbeat monitor timed out", "collective operation timeout",
)  # fmt: skip
"""Words in errors of a collective, in lower case: a rank is gone, or did not come."""
SIGNALS = {
    signal.SIGKILL: "killed from outside, or by the system for want of memory",
    signal.SIGABRT: "ended by a library: NCCL does so after a collective that timed out",
    signal.SIGSEGV: "ended inside a library",
    signal.SIGBUS: "ended inside a library",
}
"""What ends a process that may do better the next time."""


class MayPass(RunFailed):
    """A failure that may not come again: a trainer's is answered by going on from its checkpoint."""

    exit_code = EXIT


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


def _timeout(lines: Sequence[str]) -> str | None:
    """A line in which NCCL says that a collective timed out; it then aborts the process."""
    found = [line for line in lines if "nccl" in line.lower() and ("timeout" in line.lower() or "timed out" in line)]
    return f"a collective between GPUs timed out: {found[0].strip()[:200]}" if found else None


def gpu_failed(error: BaseException) -> RunFailed | None:
    """`error` as a message, when at its root a GPU was out of memory or reported an error; None for any other.
    `MayPass` where the same may go well the next time.

    By words and class name: torch is not imported here, and Triton, cuBLAS and NCCL raise classes of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        said = (str(seen).strip().splitlines() or [type(seen).__name__])[0][:300]
        starved = "NCCL error" in said and "out of memory" in str(seen)
        short = ("CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
        if starved or any(words in said for words in short):
            return RunFailed(
                f"the GPU ran out of memory: {said}",
                "it needs less with `--set train.activation_checkpointing=full --set train.optimizer_device=host` "
                "(both: what one frees the plan may fill again), a smaller train.tokens_per_microbatch and, beside an "
                "engine, `--set resources.share_mode=time_sharing`; `--resume` takes them all; `astra train --dry-run` "
                "shows what each part holds",
            )
        if "CUDA error" in said or "CUDA driver error" in said or "NCCL error" in said:
            kind = MayPass if of_gpu(str(seen)) else RunFailed
            return kind(
                f"the GPU reported an error: {said}",
                "it may belong to work that was asked of the GPU earlier: `CUDA_LAUNCH_BLOCKING=1` in the environment "
                "names the call; `astra doctor RECIPE` tries the kernels one by one; when the same GPU fails again, "
                "look for `Xid` in `dmesg`",
            )
        seen = seen.__cause__ or seen.__context__
    return None


def link_failed(error: BaseException) -> MayPass | None:
    """`error` as a message, when at its root a collective failed because another rank was gone; None for any other."""
    seen: BaseException | None = error
    while seen is not None:
        if of_link(seen):
            said = (str(seen).strip().splitlines() or [type(seen).__name__])[0][:300]
            return MayPass(f"{LINK}: {said}", "the log of the rank that ended first says why")
        seen = seen.__cause__ or seen.__context__
    return None
