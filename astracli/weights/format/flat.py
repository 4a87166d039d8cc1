"""All changes of a version in few large arrays, so that applying them takes no work for each piece.

A `WidthGroup` holds the changes among elements of one width: one array of values, one of indices, and spans that say
which part of them belongs to which range of which tensor. Pieces of one tensor that are of a kind become one span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from astracli.weights.format import codec

KINDS = {"ulp": 0, "xor": 1, "raw": 2}
"""What a value does to the old bits, as `kernels.scatter` reads it."""
REACH = 1 << 31
"""Elements of a span, at most: indices are int32."""

Bits = np.ndarray[Any, Any]


class Span(NamedTuple):
    """Changes in elements [start, start + length) of one flattened tensor."""

    name: str
    start: int
    length: int
    kind: int
    value_at: int
    """First of its values."""
    size: int
    """Values; of a dense span `length`."""
    index_at: int
    """First of its indices, as many as values, counted from `start`; -1: every element in turn."""


@dataclass
class WidthGroup:
    width: int
    """Bytes of an element: 2 or 4."""
    spans: list[Span] = field(default_factory=list)
    values: Bits = field(default_factory=lambda: np.zeros(0, "<u2"))
    """uint16 or uint32: zigzag undone, modulo 2^width; XOR; or the new bits."""
    indices: Bits = field(default_factory=lambda: np.zeros(0, "<i4"))
    """int32."""
    value_count: int = 0
    index_count: int = 0

    @property
    def nbytes(self) -> int:
        """What both arrays take, values first."""
        return -(-self.value_count * self.width // 8) * 8 + self.index_count * 4

    def lay(self, memory: Bits) -> None:
        """Put both arrays into `nbytes` bytes of memory."""
        values = self.value_count * self.width
        self.values = memory[:values].view(f"<u{self.width}")
        start = -(-values // 8) * 8
        self.indices = memory[start : start + self.index_count * 4].view("<i4")


class Place(NamedTuple):
    """Where one piece belongs: its group, its values and indices there, and what is added to its indices."""

    width: int
    value_at: int
    index_at: int
    shift: int


class Raw(NamedTuple):
    """A range of new bits as they lie in a mapped file."""

    name: str
    start: int
    bits: Bits


@dataclass
class FlatStep:
    groups: list[WidthGroup]
    raws: list[Raw]
    borrowed: bool = False
    """The groups' arrays lie in memory that goes away with the plan."""


def lay_out(pieces: Iterable[tuple[str, int, int, int, str, int]]) -> tuple[dict[int, WidthGroup], list[Place]]:
    """Groups without memory, and a place for each piece (name, width, start, length, encoding, changes), in order."""
    groups, places = {2: WidthGroup(2), 4: WidthGroup(4)}, []
    for name, width, start, length, encoding, changes in pieces:
        group, (layout, transform) = groups[width], encoding.split("-")
        dense, kind = layout == "dense", KINDS[transform]
        count = length if dense else changes
        value, index = group.value_count, -1 if dense else group.index_count
        last = group.spans[-1] if group.spans else None
        if last is not None and _continues(last, name, kind, start, length, dense):
            begin = last.start
            whole = start + length - begin
            group.spans[-1] = last._replace(length=whole, size=last.size + count)
        else:
            begin = start
            group.spans.append(Span(name, start, length, kind, value, count, index))
        group.value_count += count
        group.index_count += 0 if dense else count
        places.append(Place(width, value, index, start - begin))
    return groups, places


def _continues(last: Span, name: str, kind: int, start: int, length: int, dense: bool) -> bool:
    same = last.name == name and last.kind == kind and (last.index_at < 0) == dense
    near = last.start + last.length == start if dense else start >= last.start + last.length
    return same and near and start + length - last.start < REACH


def fill(groups: dict[int, WidthGroup], place: Place, update: codec.DecodedPiece) -> None:
    """Write one piece's changes into the groups' memory."""
    group = groups[place.width]
    group.values[place.value_at : place.value_at + len(update.values)] = update.values
    if update.indices is not None:
        target = group.indices[place.index_at : place.index_at + len(update.indices)]
        np.add(update.indices, place.shift, out=target, casting="unsafe")


def flatten(updates: Sequence[tuple[str, int, codec.DecodedPiece]]) -> FlatStep:
    """A step of decoded pieces, (tensor, start, piece), in the order of applying."""
    coded = [(name, start, u) for name, start, u in updates if "-" in u.encoding and len(u.values)]
    groups, places = lay_out((n, u.values.itemsize, s, u.length, u.encoding, len(u.values)) for n, s, u in coded)
    for group in groups.values():
        group.lay(np.empty(group.nbytes, "u1"))
    for (_, _, update), place in zip(coded, places, strict=True):
        fill(groups, place, update)
    raws = [Raw(name, start, u.values) for name, start, u in updates if u.encoding == "raw"]
    return FlatStep([group for group in groups.values() if group.spans], raws)
