"""Files of a run that a command reads back. One that is damaged is a UserError with its name, whatever is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from astracli.config import reading
from astracli.errors import UserError
from astracli.runs import tables

_INTEGERS = ("step", "n", "k")
_FRACTIONS = ("avg_at_n", "stderr", "pass_at_k")


def damaged(path: Path, what: object) -> UserError:
    return UserError(f"`{path}` is damaged: {what}", "take that file from a backup of the run")


def document(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError."""
    try:
        found = reading.document(path)
    except ValueError as error:
        raise damaged(path, error) from None
    if not isinstance(found, dict):
        raise damaged(path, "it holds no JSON object")
    return found


def lines(path: Path, *wanted: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, which have all keys `wanted`."""
    found = []
    with reading.opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = reading.from_json(line.decode("utf-8"))
                if not isinstance(row, dict) or any(name not in row for name in wanted):
                    raise ValueError(f"no object with {', '.join(wanted)}")
            except ValueError as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise damaged(path, f"line {number}: {what}") from None
            found.append(row)
    return found


def evaluations(path: Path) -> list[dict[str, str]]:
    """The rows of an `eval.csv`, whose figures are numbers."""
    try:
        rows = tables.read(path)
        for row in rows:
            row["benchmark"]
            for name in _INTEGERS:
                int(row[name])
            for name in _FRACTIONS:
                float(row[name])
    except KeyError as error:
        raise damaged(path, f"it has no column {error}") from None
    except (ValueError, csv.Error) as error:
        raise damaged(path, error) from None
    return rows
