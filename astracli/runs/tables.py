"""CSV files of a run: cells that a spreadsheet would take for a formula are written, and read back, as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astracli.config import reading

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet executes. Names of benchmarks are names of files, which come from anywhere."""


def text_of(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The CSV text of rows; numbers with six decimals."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([_cell(column) for column in columns])
    table.writerows([[_cell(row.get(column, "")) for column in columns] for row in rows])
    return text.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, as they were given."""
    with io.TextIOWrapper(reading.opened(path), encoding="utf-8", newline="") as file:
        return [{_plain(k): _plain(v) for k, v in row.items() if k is not None} for row in csv.DictReader(file)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text


def _plain(text: str | None) -> str:
    text = text or ""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
