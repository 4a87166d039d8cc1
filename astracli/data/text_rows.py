"""Rows of text files by their place in bytes: JSON Lines, a JSON list, CSV and TSV. Reading a row is one `pread`.

UTF-8, with or without a byte order mark, lines ending with LF or CRLF. Messages name file, row and line.
"""

from __future__ import annotations

import csv
import io
import json
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from astracli.config import reading
from astracli.data import values
from astracli.data.rows import Row, Rows
from astracli.errors import UserError

BOM = b"\xef\xbb\xbf"
WRAPPERS = ("data", "rows")
"""Keys under which a JSON object may hold its list of rows; the name of the split is another."""
_DELIMITERS = (",", ";", "\t")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.S)
"""Strings and brackets of JSON; what lies between tells nothing of its structure."""


def _open(path: Path, shown: Path) -> IO[bytes]:
    """A UTF-8 file, at its beginning. Raises UserError, also for UTF-16."""
    try:
        file = reading.opened(path)
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"`{shown}` is UTF-16, not UTF-8", "save it as UTF-8")
        file.seek(0)
    except OSError as error:
        raise UserError(f"cannot read `{shown}`: {(error.strerror or str(error)).lower()}") from None
    return file


class TextRows(Rows):
    """Rows that are stretches of bytes, from `self._starts[i]` to `self._end(i)`."""

    def __init__(self, path: Path, shown: Path | None = None):
        import numpy as np

        self.path = shown or path
        self._file = _open(path, self.path)
        self._starts = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _end(self, place: int) -> int:
        return int(self._starts[place + 1])

    def _text(self, place: int) -> str:
        start = int(self._starts[place])
        raw = os.pread(self._file.fileno(), self._end(place) - start, start)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._at(place)} is not UTF-8: {error}") from None

    def _at(self, place: int) -> str:
        return f"`{self.path}` line {self._line(place)}"

    def _json(self, place: int) -> Row:
        text = self._text(place).rstrip("\r\n")
        try:
            found = values.parse(text)
        except json.JSONDecodeError as error:
            line, column = self._spot(place, text, error.pos)
            raise UserError(
                f"`{self.path}` line {line} is not JSON: {error.msg} at column {column}", "one JSON object a line"
            ) from None
        except values.BadValue as error:
            if error.place is None:
                raise UserError(f"{self.where(place)} {error.what}", "mend the row, or leave it out") from None
            line, column = self._spot(place, text, error.place)
            raise UserError(
                f"`{self.path}` line {line} column {column} {error.what}", "write it as text, between quotes"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"{self._at(place)} is no JSON object but {type(found).__name__}")
        return found

    def _spot(self, place: int, text: str, at: int) -> tuple[int, int]:
        """(line, column) in the file of a character of a row."""
        breaks = text.count("\n", 0, at)
        column = at - text.rfind("\n", 0, at)
        return (self._line(place) or 1) + breaks, column if breaks else column + self._before(place)

    def _before(self, place: int) -> int:
        """Characters in front of a row on its first line."""
        return 0


class JsonlRows(TextRows):
    """One JSON object a line; empty lines are no rows."""

    def __init__(self, path: Path, shown: Path | None = None):
        import numpy as np

        super().__init__(path, shown)
        starts, numbers, place, number = [], [], 0, 0
        for number, line in enumerate(self._file, 1):
            mark = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if line[mark:].strip():
                starts.append(place + mark)
                numbers.append(number)
            place += len(line)
        self._starts = np.array([*starts, place], np.int64)
        gapless = len(numbers) == number
        self._numbers = None if gapless else np.array(numbers, np.int64)

    def _line(self, place: int) -> int:
        return place + 1 if self._numbers is None else int(self._numbers[place])

    def _raw(self, place: int) -> Mapping[str, Any]:
        return self._json(place)


def json_rows(path: Path, shown: Path, split: str) -> Rows:
    """A .json file: a list of objects, an object that holds such a list (`WRAPPERS`), or JSON Lines after all."""
    with _open(path, shown) as file:
        line = next((line.removeprefix(BOM).strip() for line in file if line.removeprefix(BOM).strip()), b"")
        more = any(line.strip() for line in file)
    if line.startswith(b"{"):
        try:
            first = values.parse(line.decode("utf-8", "replace"), long_numbers=True)
        except ValueError:
            first = None
        wrapped = isinstance(first, dict) and any(isinstance(first.get(key), list) for key in (*WRAPPERS, split))
        if first is not None and (more or not wrapped):
            return JsonlRows(path, shown)
    return JsonRows(path, shown, (*WRAPPERS, split))


class JsonRows(TextRows):
    """The objects of a JSON list, wherever their lines break."""

    def __init__(self, path: Path, shown: Path, keys: tuple[str, ...]):
        import numpy as np

        super().__init__(path, shown)
        places: list[int] = []
        if path.stat().st_size:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                places = [place for pair in self._objects(text, self._list(text, keys)) for place in pair]
        self._starts = np.array(places[::2], np.int64)
        self._ends = np.array(places[1::2], np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def _end(self, place: int) -> int:
        return int(self._ends[place])

    def _list(self, text: mmap.mmap, keys: tuple[str, ...]) -> int:
        """Where the list of rows begins."""
        depth, key = 0, b""
        for token in _TOKEN.finditer(text):
            found = token[0]
            if found in b"[{":
                named = key.strip(b'"').decode("utf-8", "replace") in keys
                if found == b"[" and (depth == 0 or (depth == 1 and named)):
                    return token.start()
                depth += 1
            elif found in b"]}":
                depth -= 1
            key = found if found.startswith(b'"') and depth == 1 else b""
        known = ", ".join(f"`{name}`" for name in keys)
        raise UserError(
            f"`{self.path}` holds no list of objects, neither as a whole nor under one of {known}",
            "save it as a JSON list of objects, or as JSON Lines",
        )

    def _objects(self, text: mmap.mmap, begin: int) -> Iterator[tuple[int, int]]:
        """(start, end) of every object of the list that begins at `begin`."""
        depth, start, end = 0, begin, begin + 1
        for token in _TOKEN.finditer(text, begin):
            found = token[0]
            opens, closes = found in b"[{", found in b"]}"
            depth += opens - closes
            if depth == 0 or (depth == 1 and not closes) or (depth == 2 and opens):
                between = text[end : token.start()].strip()
                wanted = (b"",) if end == begin + 1 or depth == 0 else (b",",)
                if token.start() > begin and (between not in wanted or (depth and found != b"{")):
                    self._no_object(text, end)
                if depth == 0:
                    return
                start = token.start()
            elif depth == 1 and closes:
                end = token.end()
                yield start, end
        raise UserError(
            f"`{self.path}` ends inside the row that begins at line {_line_at(text, start)}", "copy the file again"
        )

    def _no_object(self, text: mmap.mmap, place: int) -> None:
        raise UserError(
            f"`{self.path}` line {_line_at(text, place)}: something else than an object stands in the list of rows"
        )

    def _line(self, place: int) -> int:
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return _line_at(text, int(self._starts[place]))

    def _before(self, place: int) -> int:
        start = int(self._starts[place])
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return len(text[text.rfind(b"\n", 0, start) + 1 : start].decode("utf-8", "replace"))

    def _raw(self, place: int) -> Mapping[str, Any]:
        return self._json(place)


def _line_at(text: mmap.mmap, place: int) -> int:
    return text[:place].count(b"\n") + 1


class CsvRows(TextRows):
    """Records under a header; a quoted field may hold line breaks. Values are text, an empty field is missing."""

    def __init__(self, path: Path, shown: Path | None = None):
        import numpy as np

        super().__init__(path, shown)
        csv.field_size_limit(sys.maxsize)
        self._place = self._number = 0
        self._delimiter = self._found_delimiter(path)
        starts, numbers = [], []
        reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        place, number = 0, 1
        try:
            self._header = next(reader, [])
            self._check_header()
            place, number = self._place, self._number + 1
            for fields in reader:
                if fields:
                    starts.append(place)
                    numbers.append(number)
                place, number = self._place, self._number + 1
        except csv.Error as error:
            raise UserError(
                f"`{self.path}` line {number} is no record of CSV: {error}", "quote a field that holds quotes or breaks"
            ) from None
        self._starts = np.array([*starts, place], np.int64)
        self._numbers = np.array(numbers, np.int64)

    def _lines(self) -> Iterator[str]:
        for raw in self._file:
            self._number += 1
            self._place += len(raw)
            try:
                yield raw.removeprefix(BOM).decode("utf-8") if self._number == 1 else raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"`{self.path}` line {self._number} is not UTF-8: {error}", "save it as UTF-8"
                ) from None

    def _found_delimiter(self, path: Path) -> str:
        """A tab in .tsv; in .csv the first of comma, semicolon and tab that the header holds."""
        header = self._file.readline().decode("utf-8", "replace")
        self._file.seek(0)
        order = ("\t",) if path.suffix.lower() == ".tsv" else _DELIMITERS
        return next((mark for mark in order if mark in header), order[0])

    def _check_header(self) -> None:
        twice = sorted({name for name in self._header if self._header.count(name) > 1})
        if twice:
            raise UserError(f"`{self.path}` has two columns `{twice[0]}`", "rename one of them in its first line")

    def _line(self, place: int) -> int:
        return int(self._numbers[place])

    def _raw(self, place: int) -> Mapping[str, Any]:
        text = io.StringIO(self._text(place), newline="")
        fields = next(csv.reader(text, delimiter=self._delimiter, strict=True))
        if len(fields) != len(self._header):
            raise UserError(
                f"{self.where(place)} has {len(fields)} fields, the header {len(self._header)}",
                "quote a field that holds the delimiter",
            )
        return {name: value if value else None for name, value in zip(self._header, fields, strict=True)}
