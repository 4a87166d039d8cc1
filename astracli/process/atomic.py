"""Write a file or a folder so that a reader, and whoever comes after a crash, finds no half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, content: str | bytes, mode: int = 0o644, *, sync: bool = False) -> None:
    """Write beside and rename; folders above are made. `sync`: it survives a power cut. Raises OSError, and then leaves
    nothing beside the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp{os.getpid()}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends; when that raises, `out` is as it was."""
    working = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        yield working
        if out.exists():
            shutil.rmtree(out)
        os.replace(working, out)
    finally:
        shutil.rmtree(working, ignore_errors=True)
