"""What a command prints: data on stdout as text or JSON, notes, hints, warnings and errors on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from astracli.process.console import plain, plain_json

WIDTH = 100
"""Columns that a table may take where no terminal says less."""


class Output:
    """Where a command hands its result. With `as_json` every result is one JSON document on stdout, and no tables."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json

    def document(self, value: Any) -> None:
        """Print a JSON document."""
        _print(plain_json(json.dumps(value, indent=2, ensure_ascii=False, default=str)))

    def text(self, text: str) -> None:
        """Print plain result text."""
        _print(text)

    def passage(self, title: str, text: str) -> None:
        """Print a text of several lines under a title, its lines indented."""
        _print("\n".join([title, *(f"  {line}".rstrip() for line in text.split("\n")), ""]))

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None, document: Any = None
    ) -> None:
        """Print aligned columns within `room()`, see `table_lines`. With `as_json`, print `document` instead."""
        if self.as_json:
            return self.document(document)
        if title:
            _print(title)
        _print("\n".join(table_lines(headers, rows, room())))

    def facts(self, document: Mapping[str, Any], title: str | None = None) -> None:
        """Print a nested document as titled two-column tables, or as JSON."""
        if self.as_json:
            return self.document(document)
        for name, headers, rows in sections(document, title):
            self.table(headers, rows, name)
            _print()

    def note(self, text: str) -> None:
        """Say something that is not the result."""
        print(plain(text), file=sys.stderr)

    def hint(self, text: str) -> None:
        """Say what to do next."""
        print(plain(f"hint: {text}"), file=sys.stderr)

    def error(self, message: str, hint: str | None = None) -> None:
        """Say what happened and what to do: the end of a command that failed."""
        print(plain(f"error: {message}"), file=sys.stderr)
        if hint:
            print(plain(f"\nhint: {hint}"), file=sys.stderr)


def room() -> int:
    """Columns for a table: WIDTH, or a narrower terminal's own."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 40)).columns) if sys.stdout.isatty() else WIDTH


def _print(text: str = "") -> None:
    """Write to stdout at once. When its reader has gone, with all that it wanted, the command ends well and quietly."""
    try:
        print(plain(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[Any]], width: int = WIDTH) -> list[str]:
    """Aligned text columns; numbers to the right. What is wider than `width` is wrapped between words, the widest
    column first; a word that is longer than its column (a path) stays whole."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = len(headers) if headers else max((len(row) for row in cells), default=0)
    cells = [row + [""] * (columns - len(row)) for row in cells]
    table = ([list(headers)] if headers else []) + cells
    right = [bool(rows) and all(_is_number(row[c]) for row in rows if c < len(row)) for c in range(columns)]
    lengths = _fitted(table, right, width)
    lines = []
    for row in table:
        wrapped = [_wrapped(cell, length) for cell, length in zip(row, lengths, strict=True)]
        for number in range(max(map(len, wrapped), default=0)):
            parts = [each[number] if number < len(each) else "" for each in wrapped]
            padded = [p.rjust(n) if r else p.ljust(n) for p, n, r in zip(parts, lengths, right, strict=True)]
            lines.append("  ".join(padded).rstrip())
    return lines


LEAST = 8
"""Columns that a wrapped column keeps, unless all of it is narrower."""


def _fitted(table: Sequence[Sequence[str]], fixed: Sequence[bool], width: int) -> list[int]:
    """Widths of the columns: as wide as what they hold, the widest ones narrower until all fit in `width`, but none
    narrower than its longest word. `fixed` columns stay; where nothing helps the table is wider."""
    if not table:
        return []
    columns = range(len(table[0]))
    lengths = [max(len(row[c]) for row in table) for c in columns]
    words = [max((len(word) for row in table for word in row[c].split()), default=0) for c in columns]
    least = [n if keep else max(min(n, LEAST), word) for n, word, keep in zip(lengths, words, fixed, strict=True)]
    over = sum(lengths) + 2 * (len(lengths) - 1) - width
    while over > 0 and (wide := [c for c in columns if lengths[c] > least[c]]):
        widest = max(wide, key=lambda c: lengths[c])
        lengths[widest] -= 1
        over -= 1
    if over > 0 and columns:  # a long word in the last column hangs over, and its other words still wrap
        room = width - sum(lengths[:-1]) - 2 * (len(lengths) - 1)
        lengths[-1] = min(lengths[-1], max(20, room)) if not fixed[-1] else lengths[-1]
    return lengths


def _wrapped(cell: str, length: int) -> list[str]:
    if len(cell) <= length:
        return [cell]
    return textwrap.wrap(cell, length, break_on_hyphens=False, break_long_words=False) or [""]


def sections(
    document: Mapping[str, Any], title: str | None = None
) -> list[tuple[str | None, list[str], list[list[Any]]]]:
    """A nested document -> (title, headers, rows): plain values first, then one table a list or table inside."""
    plain = [[key, _line(value)] for key, value in document.items() if not _is_nested(value)]
    found: list[tuple[str | None, list[str], list[list[Any]]]] = [(title, [], plain)] if plain else []
    for key, value in document.items():
        name = f"{title}.{key}" if title else str(key)
        if isinstance(value, Mapping) and value:
            found += sections(value, name)
        elif _is_nested(value):
            headers = list(dict.fromkeys(k for row in value for k in row))
            found.append((name, headers, [[_line(row.get(k)) for k in headers] for row in value]))
    return found


def _is_nested(value: Any) -> bool:
    is_rows = isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
    return is_rows or (isinstance(value, Mapping) and bool(value))


def _line(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_line(item)) for item in value) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items()) or "-"
    return value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def out(as_json: bool = False) -> Output:
    """The output of one command."""
    return Output(as_json)
