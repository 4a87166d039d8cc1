"""Values of a row, made safe once: what is missing is None, text is text, and nothing is nested without end.

A run sends rows between processes as UTF-8, msgpack and JSON. What none of them can carry is refused where the row is
read, with its column.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

DEEPEST = 100
"""Levels of lists and objects inside each other."""
_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|(\d+)', re.S)
"""Strings of JSON, and digits outside them."""


class BadValue(ValueError):
    """A value that cannot be used: `column` (dotted), what is wrong with it, and its `place` in a text."""

    def __init__(self, column: str, what: str, place: int | None = None):
        super().__init__(column, what)
        self.column, self.what, self.place = column, what, place


def parse(text: str, *, long_numbers: bool = False) -> Any:
    """JSON -> value. `NaN` is None.

    Raises json.JSONDecodeError, and BadValue for what is nested too deeply and for a whole number of more digits than
    Python reads (4,300 by default); with `long_numbers` it is text.
    """
    try:
        try:
            return _JSON.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            if long_numbers:
                return _LONG_JSON.decode(text)
            raise _long_number(text) from None
    except RecursionError:
        raise BadValue("", f"is nested more than {DEEPEST} levels deep") from None


def cleaned(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with plain values. Raises BadValue.

    NaN is None; dates and times are ISO text, decimals and UUIDs text, tuples lists.
    """
    return {str(key): _plain(value, str(key), 1) for key, value in row.items()}


def _plain(value: Any, column: str, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | bytes):
        return value
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, column)
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if depth > DEEPEST:
        raise BadValue(column.split(".")[0], f"is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{column}.{key}", depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, column, depth + 1) for inner in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # an array of numpy
        return _plain(value.tolist(), column, depth)
    raise BadValue(column, f"holds a {type(value).__name__}, which is neither text nor number, list or object")


def _check_text(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise BadValue(column, f"holds half of a surrogate pair ({half}) at character {error.start + 1}") from None


def as_text(value: float | int | str) -> str:
    """A scalar as it is written: `2.0` is 2, and 1e23 has its zeros, not the digits of a binary fraction."""
    if not isinstance(value, float) or not value.is_integer():
        return str(value)
    return format(Decimal(repr(value)).to_integral_value() + 0, "f")


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _whole(digits: str) -> int | str:
    return digits if len(digits) > sys.get_int_max_str_digits() else int(digits)


def _long_number(text: str) -> BadValue:
    most = sys.get_int_max_str_digits()
    long = next(found for found in _NUMBER.finditer(text) if len(found[1] or "") > most)
    return BadValue("", f"holds a whole number of {len(long[1]):,} digits, of which {most:,} can be read", long.start())


_JSON = json.JSONDecoder(parse_constant=_constant)
_LONG_JSON = json.JSONDecoder(parse_constant=_constant, parse_int=_whole)
