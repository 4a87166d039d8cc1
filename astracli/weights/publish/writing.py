"""A payload file while it is being written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import xxhash

from astracli.weights.format.manifest import FileEntry


class HashingFile:
    """Temporary name, running hash, renamed at the end; no bytes, no file."""

    def __init__(self, path: Path):
        self.path, self.offset = path, 0
        self._part = path.with_name(f"{path.name}.tmp{os.getpid()}")
        self._hash = xxhash.xxh3_128()
        self._file: BinaryIO | None = None

    def write(self, blob: bytes) -> int:
        """Append, and say at which offset."""
        if self._file is None:
            self._file = open(self._part, "wb")  # noqa: SIM115  closed in `close`
        at = self.offset
        self._file.write(blob)
        self._hash.update(blob)
        self.offset += len(blob)
        return at

    def close(self) -> dict[str, FileEntry]:
        if self._file is None:
            return {}
        self._file.close()
        os.replace(self._part, self.path)
        return {self.path.name: FileEntry(self.offset, self._hash.hexdigest())}
