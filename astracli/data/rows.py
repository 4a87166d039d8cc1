"""Rows of a data set, read when they are asked for: every kind of file and directory behind one door.

What `open_rows(path, split)` keeps in memory, however long the texts are:

    .jsonl .ndjson        8 bytes a row; 16 where the file has empty lines
    .csv .tsv             16 bytes a row, and the header
    .json                 16 bytes a row of a list of objects
    .parquet              the latest `GROUPS` row groups
    .arrow .feather       nothing that is not compressed (memory-mapped); the latest `GROUPS` batches of a compressed
                          file, all of a compressed stream
    a directory           as its file `SPLIT.csv` or the like; else nothing (memory-mapped Arrow, which `datasets`
                          writes into its cache)
    any of them + .gz or .zst    as above, of a copy that is unpacked once, to disk
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from astracli.config.benchmarks import SUFFIXES
from astracli.data.unpack import unpacked
from astracli.data.values import BadValue, cleaned
from astracli.errors import UserError

GROUPS = 8
"""Decoded Parquet row groups kept: a shuffled epoch comes back to them."""
Row = dict[str, Any]


class Rows:
    """The rows of a data set; sub-classes say how many there are and read one."""

    path: Path

    def row(self, place: int) -> Row:
        """The row at 0 <= place < len(self), its values `cleaned`. Raises UserError when it cannot be read."""
        return self.checked(place, self._raw(place))

    def where(self, place: int) -> str:
        """A row for a message: ``row 3 of `set.jsonl` (line 4)``."""
        line = self._line(place)
        return f"row {place + 1} of `{self.path}`" + (f" (line {line})" if line is not None else "")

    def checked(self, place: int, row: Mapping[str, Any]) -> Row:
        try:
            return cleaned(row)
        except BadValue as error:
            column = f"column `{error.column}` " if error.column else ""
            raise UserError(f"{self.where(place)}: {column}{error.what}", "mend the row, or leave it out") from None

    def _raw(self, place: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def _line(self, place: int) -> int | None:
        """Number of the line where a row begins; None in a file without lines."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


def open_rows(path: Path, split: str, config: str | None = None) -> Rows:
    """The rows of a file, or of one split of a directory that `datasets` reads. Raises UserError.

    `config`: of a directory with several, as a Hub repository may have.
    """
    from astracli.data import text_rows

    if path.is_dir():
        file = _file_of_split(path, split) if config is None else None
        return TableRows(path, split, config) if file is None else open_rows(file, split)
    plain = unpacked(path)
    suffix = plain.suffix.lower()
    if suffix == ".parquet":
        return ParquetRows(plain, path)
    if suffix in (".arrow", ".feather"):
        return ArrowRows(plain, path)
    if suffix in (".csv", ".tsv"):
        return text_rows.CsvRows(plain, path)
    if suffix == ".json":
        return text_rows.json_rows(plain, path, split)
    return text_rows.JsonlRows(plain, path)


def _file_of_split(folder: Path, split: str) -> Path | None:
    """The one file that holds a split, by its name (`train.csv`); None: `datasets` finds out what there is."""
    if is_saved(folder) or (folder / "README.md").is_file():
        return None
    found = [folder / f"{split or 'test'}{suffix}" for suffix in SUFFIXES]
    there = [file for file in found if file.is_file()]
    return there[0] if len(there) == 1 else None


class ParquetRows(Rows):
    """A row costs the decoding of its row group, unless that is among the latest ones."""

    def __init__(self, path: Path, shown: Path | None = None):
        import numpy as np
        import pyarrow
        import pyarrow.parquet

        self.path = shown or path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"`{self.path}` is no readable Parquet file: {error}") from None
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self.group = lru_cache(GROUPS)(self._read)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self, group: int) -> Any:
        import pyarrow

        try:
            return self._file.read_row_group(group)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"`{self.path}` row group {group} cannot be read: {error}") from None

    def _raw(self, place: int) -> Mapping[str, Any]:
        group = int(self._ends.searchsorted(place, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        return _only_row(self.group(group), place - first, self.where(place))

    def __iter__(self) -> Iterator[Row]:
        place = 0
        for batch in self._file.iter_batches(1024):
            for i in range(batch.num_rows):
                yield self.checked(place, _only_row(batch, i, self.where(place)))
                place += 1


class ArrowRows(Rows):
    """An Arrow IPC file (or Feather 2), or a stream as `datasets` caches it; memory-mapped."""

    def __init__(self, path: Path, shown: Path | None = None):
        import numpy as np
        import pyarrow

        self.path = shown or path
        try:
            mapped = pyarrow.memory_map(str(path))
            try:
                file = pyarrow.ipc.open_file(mapped)
            except pyarrow.ArrowInvalid:
                mapped.seek(0)
                batches = list(pyarrow.ipc.open_stream(mapped))
                sizes = [batch.num_rows for batch in batches]
                self.batch: Callable[[int], Any] = batches.__getitem__
            else:
                sizes = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
                self.batch = lru_cache(GROUPS)(file.get_batch)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"`{self.path}` is no readable Arrow file: {error}") from None
        self._ends = np.cumsum(np.array(sizes, np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _raw(self, place: int) -> Mapping[str, Any]:
        number = int(self._ends.searchsorted(place, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return _only_row(self.batch(number), place - first, self.where(place))


def _only_row(table: Any, place: int, where: str) -> Row:
    """One row of an Arrow table or batch. Raises UserError for text that is not UTF-8."""
    try:
        found: list[Row] = table.slice(place, 1).to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"{where} cannot be read: {error}", "mend the row, or leave it out") from None
    return found[0]


class TableRows(Rows):
    """One split of a directory that `datasets` reads: saved by it, or holding files of one of its formats."""

    def __init__(self, path: Path, split: str, config: str | None = None):
        import datasets

        self.path = path
        try:
            if is_saved(path):
                found: Any = datasets.load_from_disk(str(path))
            elif "[" in split or "+" in split:  # a slice or a sum of splits, which `datasets` works out
                found = datasets.load_dataset(str(path), config, split=split)
            else:
                found = datasets.load_dataset(str(path), config)
        except Exception as error:
            raise UserError(
                f"`{path}` is no `datasets` directory: {_cause(error)}",
                "set data.config to one of them" if "onfig name is missing" in str(error) else None,
            ) from None
        self._table = split_of(found, split, str(path))

    def __len__(self) -> int:
        return len(self._table)

    def _raw(self, place: int) -> Mapping[str, Any]:
        return dict(self._table[place])

    def __iter__(self) -> Iterator[Row]:
        for place, row in enumerate(self._table):
            yield self.checked(place, row)


def _cause(error: BaseException) -> str:
    """The innermost reason: `datasets` wraps what its readers say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def is_saved(path: Path) -> bool:
    """Whether a directory is what `datasets` calls saved (`save_to_disk`)."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def split_of(found: Any, split: str, origin: str) -> Any:
    """One split of what `datasets` loaded; "" is `test`, else the only one. Raises UserError with those there are."""
    if not isinstance(found, Mapping):
        return found
    if not split and ("test" in found or len(found) == 1):
        return found["test"] if "test" in found else next(iter(found.values()))
    if split not in found:
        raise UserError(f"`{origin}` has no split `{split}`: {', '.join(map(str, found))}", "set data.split")
    return found[split]
