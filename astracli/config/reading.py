"""Text files that a user names: of a limited size, never a pipe or a device; and JSON and TOML of any depth."""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

RECIPE_BYTES = 1 << 20
DOCUMENT_BYTES = 64 << 20
"""Of a JSON document: config.json, status.json, an index of shards, facts of a machine."""

TOKENIZER_BYTES = 512 << 20


def opened(path: Path) -> BufferedReader:
    """A regular file, to be read and closed. Opening never waits, as it would for a named pipe.

    Raises OSError, whose `strerror` also says when it is no file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    file = os.fdopen(handle, "rb")
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return file
    file.close()
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def text(path: Path, limit: int = DOCUMENT_BYTES) -> str:
    """The text of a regular file of at most `limit` bytes.

    Raises OSError, whose `strerror` also says when it is no file or too large, and UnicodeDecodeError.
    """
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
    return content.decode("utf-8")


def from_json(source: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for nesting that is too deep to be read."""
    try:
        return json.loads(source)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_toml(source: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError, also for nesting that is too deep to be read."""
    try:
        return tomllib.loads(source)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def document(path: Path, limit: int = DOCUMENT_BYTES) -> Any:
    """The value of a JSON file. Raises OSError and ValueError."""
    return from_json(text(path, limit))


def is_file(path: Path) -> bool:
    """Whether a file is there; False for names that no file can have, and for what this user cannot look at."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """The same of a directory."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
