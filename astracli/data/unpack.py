"""Compressed files and Hub sets as plain files on this machine: the cache directory, and what is unpacked there.

A row is read by its place in the file, which needs a plain file: `.gz` and `.zst` are unpacked once, to disk.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from astracli.config.benchmarks import PACKED
from astracli.errors import UserError

PIECE = 1 << 20
"""Bytes that are read at a time."""


def cache_dir() -> Path:
    """ASTRA_CACHE_DIR, else `astra` in the user's cache directory."""
    own = os.environ.get("ASTRA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "astra"


def unpacked(path: Path) -> Path:
    """`path` itself, or the plain file that it holds, in the cache under a name of its size and time of change.

    Raises UserError when it cannot be unpacked.
    """
    if path.suffix not in PACKED:
        return path
    found = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{found.st_size}\n{found.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_dir() / "datasets" / f"{Path(path.stem).stem}-{key}{Path(path.stem).suffix}"
    if target.exists():
        return target
    import zstandard

    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as packed, partial.open("wb") as out:
            for piece in _gunzipped(packed) if path.suffix == ".gz" else _unzstd(packed):
                out.write(piece)
        partial.replace(target)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"`{path}` cannot be unpacked: {error}", "copy or download the file again") from None
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot unpack `{path}` to `{target}`: {(error.strerror or str(error)).lower()}",
            "free disk space, or set ASTRA_CACHE_DIR to another disk",
        ) from None
    return target


def _gunzipped(packed: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed) as plain:
        while piece := plain.read(PIECE):
            yield piece


def _unzstd(packed: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame. Raises EOFError for a frame without an end, which `zstandard` itself takes for the end."""
    import zstandard

    frame = None
    while piece := packed.read(PIECE):
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            piece = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle")
