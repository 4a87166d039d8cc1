"""A plain document as TOML; what reads it back is `reading.from_toml`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def text_of(document: Mapping[str, Any]) -> str:
    """Tables below the values of each; a key whose value is None is left out (TOML has no null)."""
    lines: list[str] = []
    _emit(document, (), lines)
    return "\n".join(lines).strip() + "\n"


def _emit(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    values = {key: value for key, value in table.items() if value is not None and key not in tables}
    if path and values:
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(key)} = {_toml(value)}" for key, value in values.items()]
    for key, value in tables.items():
        _emit(value, (*path, key), lines)


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml(text)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(v)}" for key, v in value.items() if v is not None) + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
