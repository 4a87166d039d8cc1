"""Errors that people read: what happened, with the value, and what to do next."""

from __future__ import annotations

import errno

from astracli.process import transient

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = (
    *("no space left", "disk is full", "file too large", "quota exceeded", "(os error 27)", "(os error 28)"),
    "enforce fail at inline_container",  # torch.save, whose zip file came out shorter than what was written
)


class AstraError(Exception):
    """Base of every error that ends a command. `hint` names the next command; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UserError(AstraError, ValueError):
    """Bad input: a recipe, an option or a file that the user can mend. Exit 2, before anything started."""

    exit_code = 2


class RunFailed(AstraError, RuntimeError):
    """A run or a check that failed after it had started. Exit 1."""

    exit_code = 1


class MayPass(RunFailed):
    """A failure that may not come again (`transient`): a trainer's is answered by going on from its checkpoint."""

    exit_code = transient.EXIT


def disk_full(error: BaseException) -> RunFailed | None:
    """`error` as a message, when at its root a disk, a quota or a file-size limit was full; None for any other.

    Libraries wrap it (safetensors and SQLite give words only), so the whole chain and the words are looked at.
    """
    seen: BaseException | None = error
    while seen is not None:
        lines = str(seen).strip().splitlines() or [type(seen).__name__]
        telling = [line for line in lines if any(word in line.lower() for word in FULL_WORDS)]
        if telling or (isinstance(seen, OSError) and seen.errno in FULL):
            return RunFailed(
                f"writing failed, a disk, a quota or a limit on file sizes is full: {(telling or lines)[0].strip()}",
                "free space (`astra runs clean`, `df -h`, `ulimit -f`), then go on with `astra train --resume RUN_DIR`",
            )
        seen = seen.__cause__ or seen.__context__
    return None


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
                "engine, `--set resources.share_mode=turns`; `--resume` takes them all; `astra train --dry-run` "
                "shows what each part holds",
            )
        if "CUDA error" in said or "CUDA driver error" in said or "NCCL error" in said:
            kind = MayPass if transient.of_gpu(str(seen)) else RunFailed
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
        if transient.of_link(seen):
            said = (str(seen).strip().splitlines() or [type(seen).__name__])[0][:300]
            return MayPass(f"{transient.LINK}: {said}", "the log of the rank that ended first says why")
        seen = seen.__cause__ or seen.__context__
    return None
