"""Errors that people read: what happened, with the value, and what to do next."""

from __future__ import annotations

import errno
import os

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
        if "disk I/O error" in lines[0]:  # SQLite says no more than that
            return RunFailed(
                f"writing failed: {lines[0].strip()}: the disk is full or broken, its directory is gone, or a limit on "
                "file sizes was reached",
                "look at `df -h`, `dmesg` and `ulimit -f`, then go on with `astra train --resume RUN_DIR`",
            )
        seen = seen.__cause__ or seen.__context__
    return None


BROKEN = (errno.EROFS, errno.EIO)
BROKEN_WORDS = ("read-only file system", "readonly database", "input/output error")


def disk_failed(error: BaseException) -> RunFailed | None:
    """`disk_full`, or a file system that turned read-only or cannot be reached, in the middle of a run."""
    seen: BaseException | None = error
    while seen is not None:
        line = str(seen).strip().partition("\n")[0]
        if (isinstance(seen, OSError) and seen.errno in BROKEN) or any(word in line.lower() for word in BROKEN_WORDS):
            return RunFailed(
                f"writing failed, the file system cannot be written any more: {line}",
                "look at `dmesg` and `mount`, mend it, then go on with `astra train --resume RUN_DIR`",
            )
        seen = seen.__cause__ or seen.__context__
    return disk_full(error)


BY_PATH = (
    errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP,
    errno.ENXIO, errno.EINVAL,
)  # fmt: skip
"""What the system says of a path that cannot be used as it was given."""


def refused_by_system(error: BaseException) -> AstraError | None:
    """`error` as a message, when the system refused a path (bad input), or had no memory or descriptors left (the
    command failed); None for any other."""
    if isinstance(error, MemoryError):
        return RunFailed("this process got no more memory", "`free -h` and `ulimit -v` say what there is")
    if not isinstance(error, OSError):
        return None
    words = (error.strerror or str(error)).lower()
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return RunFailed(f"{words}: this process may open no more files", "raise `ulimit -n`")
    if error.errno in BY_PATH and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        shown = name if len(name) <= 120 else f"{name[:100]}...{name[-10:]}"
        return UserError(f"cannot use `{shown}`: {words}", "check the path and who may read and write it")
    return None


def _package_broken(error: BaseException | None) -> RunFailed | None:
    """A module of this package that cannot be imported: its files were changed or lost after they were installed."""
    own = os.path.dirname(os.path.abspath(__file__))
    if isinstance(error, SyntaxError) and os.path.abspath(error.filename or "").startswith(own + os.sep):
        what = f"`{error.filename}` line {error.lineno}: {error.msg}"
    elif isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "astracli":
        what = str(error)
    else:
        return None
    hint = (
        "its files were changed after it was installed: install it again, then `astra train --resume RUN_DIR` goes on"
    )
    return RunFailed(f"the installed astracli is damaged: {what}", hint)


def machine_failed(error: BaseException) -> RunFailed | None:
    """`disk_failed`, a process that got no more memory, descriptors or threads, or a damaged installation; None for any
    other error."""
    if (failed := disk_failed(error)) is not None:
        return failed
    seen: BaseException | None = error
    while seen is not None:
        found, words = refused_by_system(seen), str(seen).partition("\n")[0]
        if isinstance(found, RunFailed):
            return found
        if (damaged := _package_broken(seen)) is not None:
            return damaged
        if "too many open files" in words.lower():  # as libraries say it
            return RunFailed(f"{words}: this process may open no more files", "raise `ulimit -n`")
        no_fork = isinstance(seen, BlockingIOError) and seen.errno == errno.EAGAIN
        if no_fork or "can't start new thread" in words:
            return RunFailed(
                f"{words}: this user may start no more processes or threads",
                "raise `ulimit -u`, or the limit on processes of the container",
            )
        seen = seen.__cause__ or seen.__context__
    return None
