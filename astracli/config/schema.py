"""Walk the recipe schema by dotted key, and say in words what a field takes and what is wrong with a value."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from astracli.config.recipe import Recipe
from astracli.config.recipe_run import Table

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Slot:
    """One place in the schema: its annotation and the constraints that pydantic took out of it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    @property
    def table(self) -> type[Table] | None:
        """The model class when this place is a table, also when it may be absent."""
        for kind in _alternatives(self.annotation):
            if isinstance(kind, type) and issubclass(kind, Table):
                return kind
        return None

    def child(self, key: str | int) -> Slot | None:
        """The place that `key` names inside this one; None when there is none."""
        if self.table is not None:
            if (field := self.table.model_fields.get(str(key))) is not None:
                return _slot(field)
            brought = self.table.brought().get(str(key))
            return None if brought is None else Slot(brought)
        for kind in _alternatives(self.annotation):
            origin, args = get_origin(kind), get_args(kind)
            if origin is dict and isinstance(key, str):
                return _plain(args[1])
            if origin in (list, tuple) and isinstance(key, int):
                return _plain(args[0] if origin is list else args[min(key, len(args) - 1)])
        return None

    def accepts(self, value: Any) -> bool:
        """True when this place takes `value` as it is."""
        kind: Any = Annotated[self.annotation, *self.metadata] if self.metadata else self.annotation
        try:
            TypeAdapter(kind).validate_python(value, strict=not _holds_tuple(self.annotation))
        except ValidationError:
            return False
        return True

    def allowed(self) -> str:
        """What this place takes, in words: `a whole number greater than 0`."""
        bounds = " and ".join(_bounds(self.metadata))
        words = [_words(kind, bounds) for kind in _alternatives(self.annotation) if kind is not type(None)]
        return " or ".join(words)


ROOT = Slot(Recipe)


def at(keys: Sequence[str | int]) -> Slot | None:
    """The place in the schema that a dotted key names; None when the schema has no such key."""
    slot: Slot | None = ROOT
    for key in keys:
        slot = None if slot is None else slot.child(key)
    return slot


def dotted_keys(slot: Slot = ROOT, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, tables and leaves, in the order of the schema."""
    if slot.table is None:
        return
    for name, field in slot.table.model_fields.items():
        yield prefix + name
        inside = _slot(field)
        yield from dotted_keys(inside.child(0) or inside, f"{prefix}{name}.")
    for name, table in slot.table.brought().items():
        yield prefix + name
        yield from dotted_keys(Slot(table), f"{prefix}{name}.")


def nearest_key(dotted: str) -> str | None:
    """The valid dotted key closest to an invalid one: same table first, then the same last name, then, where there is
    no such table, any. (The name of a table alone makes `train.foo` and `train.eps` alike.)"""
    table, _, leaf = re.sub(r"\[\d+\]", "", dotted).rpartition(".")
    keys = list(dotted_keys())
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == table}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return siblings[close[0]]
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    if not close and table not in keys:
        close = difflib.get_close_matches(dotted, keys, n=1)
    return leaves.get(close[0], close[0]) if close else None


def complaint(error: dict[str, Any]) -> tuple[str, str | None]:
    """One pydantic error -> (message with dotted key and value, hint)."""
    keys: list[str | int] = list(error["loc"])
    if error["type"] not in ("extra_forbidden", "missing", "refused") and keys and at(keys) is None:
        keys.pop()  # which of a place's alternatives: each of them complains
    dotted, value = _dotted(keys), _show(error["input"])
    if error["type"] == "extra_forbidden":
        table, _, name = dotted.rpartition(".")
        moved = [key for key in dotted_keys() if key.startswith(f"{table}.") and key.endswith(f".{name}")]
        if moved:
            places = " and ".join(f"`{key}`" for key in moved)
            return f"`{dotted}` = {value} has its place in {places}", None
        near = nearest_key(dotted)
        return f"unknown key `{dotted}` (= {value})", f"did you mean `{near}`?" if near else None
    if error["type"] == "refused":
        return f"`{dotted}` = {value} {error['msg']}", error["ctx"]["hint"]
    if error["type"] == "missing":
        slot = at(keys)
        what = "a table" if slot is None or slot.table else slot.allowed()
        return f"`{dotted}` is missing: {what} is needed", None
    if not keys:
        return str(error["msg"]).removeprefix("Value error, "), None
    slot = at(keys)
    return f"`{dotted}` = {value} is not allowed: it takes {slot.allowed() if slot else error['msg']}", None


def _slot(field: FieldInfo) -> Slot:
    return Slot(field.annotation, tuple(field.metadata))


def _plain(annotation: Any) -> Slot:
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        return _slot(FieldInfo.from_annotation(Annotated[kind, *metadata]))
    return Slot(annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _holds_tuple(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in _alternatives(annotation))


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        for part in item if isinstance(item, annotated_types.GroupedMetadata) else (item,):
            if isinstance(part, annotated_types.MinLen):
                yield "that is not empty"
            elif isinstance(part, annotated_types.Gt):
                yield f"greater than {part.gt}"
            elif isinstance(part, annotated_types.Ge):
                yield f"of at least {part.ge}"
            elif isinstance(part, annotated_types.Lt):
                yield f"less than {part.lt}"
            elif isinstance(part, annotated_types.Le):
                yield f"at most {part.le}"


def _words(kind: Any, bounds: str) -> str:
    if get_origin(kind) is Annotated:
        plain = _plain(kind)
        return _words(plain.annotation, bounds or " and ".join(_bounds(plain.metadata)))
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin is list:
        return f"a list {bounds}".strip() + f", each entry {_plain(args[0]).allowed()}"
    if origin is tuple:
        return f"a list of {len(args)}, each entry {_plain(args[0]).allowed()}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, Table)):
        return "a table"
    return f"{_WORDS.get(kind, str(kind))} {bounds}".strip()


def _dotted(keys: Sequence[str | int]) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting without end
        text = "a number of more digits than can be shown" if isinstance(value, int) else "a value that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."
