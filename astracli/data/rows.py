"""Rows of a data set, read when they are asked for: .jsonl, .parquet and `datasets` directories behind one door.

`open_rows(path, split)` keeps little in memory: 8 bytes a row of a .jsonl file, the latest `GROUPS` row groups of a
.parquet file, nothing of a `datasets` directory (memory-mapped Arrow).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from astracli.errors import UserError

GROUPS = 8
"""Decoded Parquet row groups kept: a shuffled epoch comes back to them."""
Row = dict[str, Any]


class Rows:
    """The rows of a data set; sub-classes say how many there are and read one."""

    def row(self, place: int) -> Row:
        """The row at 0 <= place < len(self). Raises UserError when it cannot be read."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


def open_rows(path: Path, split: str) -> Rows:
    """The rows of a .jsonl or .parquet file, or of one split of a `datasets` directory. Raises UserError."""
    if path.is_dir():
        return TableRows(path, split)
    return ParquetRows(path) if path.suffix == ".parquet" else JsonlRows(path)


class JsonlRows(Rows):
    """One JSON object a line; empty lines are no rows. Reading a row is one `pread`, from any thread."""

    def __init__(self, path: Path):
        import numpy as np

        self._path = path
        starts, numbers, place, number = [], [], 0, 0
        try:
            self._file = path.open("rb")
            for number, line in enumerate(self._file, 1):
                if line.strip():
                    starts.append(place)
                    numbers.append(number)
                place += len(line)
        except OSError as error:
            raise UserError(f"cannot read `{path}`: {(error.strerror or str(error)).lower()}") from None
        self._starts = np.array([*starts, place], np.int64)
        gapless = len(numbers) == number
        self._numbers = None if gapless else np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, place: int) -> Row:
        start, end = int(self._starts[place]), int(self._starts[place + 1])
        number = place + 1 if self._numbers is None else int(self._numbers[place])
        try:
            found = json.loads(os.pread(self._file.fileno(), end - start, start).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"`{self._path}` line {number} is not UTF-8: {error}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"`{self._path}` line {number} is not JSON: {error}", "one JSON object a line") from None
        if not isinstance(found, dict):
            raise UserError(f"`{self._path}` line {number} is no JSON object but {type(found).__name__}")
        return found


class ParquetRows(Rows):
    """A row costs the decoding of its row group, unless that is among the latest ones."""

    def __init__(self, path: Path):
        import numpy as np
        import pyarrow.parquet

        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (OSError, ValueError) as error:
            raise UserError(f"`{path}` is no readable Parquet file: {error}") from None
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self.group = lru_cache(GROUPS)(self._read)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self, group: int) -> Any:
        try:
            return self._file.read_row_group(group)
        except (OSError, ValueError) as error:
            raise UserError(f"`{self._path}` row group {group} cannot be read: {error}") from None

    def row(self, place: int) -> Row:
        group = int(self._ends.searchsorted(place, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        found: list[Row] = self.group(group).slice(place - first, 1).to_pylist()
        return found[0]

    def __iter__(self) -> Iterator[Row]:
        for batch in self._file.iter_batches(1024):
            yield from batch.to_pylist()


class TableRows(Rows):
    """One split of a directory that `datasets` reads: saved by it, or holding files of one of its formats."""

    def __init__(self, path: Path, split: str):
        import datasets

        try:
            found: Any = datasets.load_from_disk(str(path)) if is_saved(path) else datasets.load_dataset(str(path))
        except Exception as error:
            raise UserError(f"`{path}` is no `datasets` directory: {error}") from None
        self._table = split_of(found, split, str(path))

    def __len__(self) -> int:
        return len(self._table)

    def row(self, place: int) -> Row:
        return dict(self._table[place])

    def __iter__(self) -> Iterator[Row]:
        for row in self._table:
            yield dict(row)


def is_saved(path: Path) -> bool:
    """Whether a directory is what `datasets` calls saved (`save_to_disk`)."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def split_of(found: Any, split: str, origin: str) -> Any:
    """One split of what `datasets` loaded. Raises UserError with the splits that there are."""
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise UserError(f"`{origin}` has no split `{split}`: {', '.join(map(str, found))}", "set data.split")
    return found[split]
