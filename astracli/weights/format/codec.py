"""Lossless coding of the difference between two versions of one tensor's raw bits. `docs/weights.md` is the format.

A float is looked at as its bits: uint16 for bf16 and fp16, uint32 for fp32. *Changed* means that the bits differ, so
NaN payloads, infinities and -0.0 come back exactly. Changed positions are gap-coded, one byte each with an escape;
values are differences in ULP (the distance in the monotone order of all bit patterns, zigzag, modulo 2^width) or XOR;
each byte of each number goes into its own plane, because planes differ in what they look like (`container.py`).

Letters: N elements of the piece, C changed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from astracli.weights import WeightCorrupt
from astracli.weights.format.container import (
    ESCAPE,
    MAX_PIECE,
    Bits,
    deflate,
    indices_of,
    inflate,
    join,
    list_planes,
    open_planes,
    planes_of,
    put_together,
    unsigned,
)

_DENSE_FROM = 1 / 8  # a lower density never codes smaller as a dense plane: a Huffman symbol costs a bit at least
_WINDOW, _WINDOWS = 1 << 15, 4  # the sample on which encodings are compared
_SCAN = 1 << 18  # elements compared at a time: both inputs stay in the cache


@dataclass(frozen=True)
class Encoded:
    """One piece as it travels."""

    encoding: str
    """`none`, or a key of ENCODINGS."""
    count: int
    """Elements whose bits changed."""
    payload: bytes


@dataclass(frozen=True)
class DecodedPiece:
    """A decoded piece: what to do to the base."""

    encoding: str
    length: int
    """N, elements of the piece."""
    indices: Bits | None
    """int64 [C], strictly increasing, inside the piece; None for a dense encoding."""
    values: Bits
    """uint16 or uint32, [C] or dense [N]: ULP difference modulo 2^width, XOR, or the new bits."""


def changed_indices(base: Bits, new: Bits) -> Bits:
    """int64 [C]: where two flat arrays of bits [N], of one dtype, differ."""
    found = []
    for start in range(0, len(base), _SCAN):
        at = np.flatnonzero(base[start : start + _SCAN] != new[start : start + _SCAN])
        if start:
            at += start
        found.append(at)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def encode(base: Bits, new: Bits, level: int = 1) -> Encoded:
    """The difference from `base` to `new`, both uint16 or both uint32 [N], in the smallest encoding at zstd `level`."""
    return encode_changed(base, new, changed_indices(base, new), level)


def encode_changed(base: Bits, new: Bits, indices: Bits, level: int = 1) -> Encoded:
    """`encode`, when `changed_indices` is known already."""
    if len(base) > MAX_PIECE:
        raise ValueError(f"a piece of {len(base)} elements; the most is {MAX_PIECE}")
    if not len(indices):
        return Encoded("none", 0, b"")
    return encode_as(_choose(base, new, indices, level), base, new, indices, level)


def encode_as(encoding: str, base: Bits, new: Bits, indices: Bits, level: int = 1) -> Encoded:
    """`encode_changed` in a given encoding; some position must have changed."""
    return Encoded(encoding, len(indices), _pack(_difference(encoding, base, new, indices), len(indices), level))


def decode(payload: bytes | memoryview, encoding: str, count: int, length: int, itemsize: int) -> DecodedPiece:
    """A payload as what it does to the base. `encoding`, `count`, `length` and `itemsize` are the manifest's.

    Raises WeightCorrupt when any byte is not what `encode` wrote.
    """
    if encoding == "none":
        if count or len(payload):
            raise WeightCorrupt(f"an unchanged piece with {count} changes and {len(payload)} bytes")
        return DecodedPiece("none", length, np.zeros(0, np.int64), np.zeros(0, unsigned(itemsize)))
    planes, escapes = open_planes(payload, encoding, count, length, itemsize)
    dense = encoding.startswith("dense-")
    values = join([inflate(frame, length if dense else count) for frame in planes[-itemsize:]])
    indices = None
    if dense:
        changed = count if encoding == "dense-raw" else int(np.count_nonzero(values))
    else:
        indices = indices_of(planes, count, escapes, length)
        changed = int(np.count_nonzero(values))
    if changed != count:
        raise WeightCorrupt(f"payload changes {changed} elements, its header says {count}")
    return DecodedPiece(encoding, length, indices, _unzigzag(values) if encoding.endswith("-ulp") else values)


# ---- values ----------------------------------------------------------------------------------------------------------


def _sign_fill(bits: Bits) -> Bits:
    """All ones where the top bit is set, else zero."""
    width = bits.itemsize * 8
    return (bits.view(f"<i{bits.itemsize}") >> (width - 1)).view(bits.dtype)


def to_order(bits: Bits) -> Bits:
    """Bits -> position in the order of the floats: negative ones reversed, below the positive ones. A bijection."""
    mask = _sign_fill(bits)
    mask |= bits.dtype.type(1 << (bits.itemsize * 8 - 1))
    mask ^= bits
    return mask


def _zigzag(difference: Bits) -> Bits:
    """0, -1, 1, -2, ... -> 0, 1, 2, 3, ...: small differences of either sign have a zero high byte."""
    fill = _sign_fill(difference)
    fill ^= difference << difference.dtype.type(1)
    return fill


def _unzigzag(values: Bits) -> Bits:
    one = values.dtype.type(1)
    return (values >> one) ^ (~(values & one) + one)


def _difference(encoding: str, base: Bits, new: Bits, indices: Bits) -> DecodedPiece:
    """What is stored for `encoding`: the values of a piece, ULP differences still in zigzag form."""
    layout, transform = encoding.split("-")
    if layout == "gap":
        old, now, at = base[indices], new[indices], indices
    else:
        old, now, at = base, new, None
    if transform == "ulp":
        values = _zigzag(to_order(now) - to_order(old))
    else:
        values = old ^ now if transform == "xor" else now
    return DecodedPiece(encoding, len(base), at, values)


def candidates(itemsize: int, count: int, length: int) -> list[str]:
    """Encodings worth trying for `count` changes among `length` elements; with one, nothing is tried."""
    found = ["gap-ulp"] if itemsize == 2 else ["gap-ulp", "gap-xor"]
    if count > length * _DENSE_FROM:
        found += ["dense-ulp", "dense-xor", "dense-raw"]
    return found


def _choose(base: Bits, new: Bits, indices: Bits, level: int) -> str:
    """The candidate that codes a sample smallest."""
    names = candidates(base.itemsize, len(indices), len(base))
    if len(names) == 1:
        return names[0]
    if len(base) > _WINDOW * _WINDOWS:
        starts = np.linspace(0, len(base) - _WINDOW, _WINDOWS).astype(int)
        base, new = (np.concatenate([bits[low : low + _WINDOW] for low in starts]) for bits in (base, new))
        indices = changed_indices(base, new)
    if not len(indices):
        return names[0]
    return min(names, key=lambda name: len(encode_as(name, base, new, indices, level).payload))


def _pack(piece: DecodedPiece, count: int, level: int) -> bytes:
    short = long = None
    if piece.indices is not None:
        gaps = np.diff(piece.indices, prepend=-1) - 1
        short, long = np.minimum(gaps, ESCAPE).astype(np.uint8), gaps[gaps >= ESCAPE]
    frames = [deflate(plane, level) for plane in list_planes(short, long, planes_of(piece.values))]
    escapes = 0 if long is None else len(long)
    return put_together(piece.encoding, piece.length, count, escapes, piece.values.itemsize, frames)
