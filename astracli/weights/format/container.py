"""The bytes of one coded piece: a checked header and byte planes, each through zstd. `docs/weights.md` is the format.

`codec` says what the planes mean. What is read is not trusted: sizes are checked before memory is allocated, positions
before they are used.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard

from astracli.weights import WeightCorrupt

MAX_PIECE = 1 << 31
"""Elements of one piece, at most."""
ENCODINGS = {"gap-ulp": 1, "gap-xor": 2, "dense-ulp": 3, "dense-xor": 4, "dense-raw": 5}
"""Encoding -> its code in the payload. `none` has no payload, `raw` is the plain bytes of a full version."""
ESCAPE = 255
"""A gap of this or more stands in the list of long gaps."""

MAGIC = b"ADP1"
HEADER = struct.Struct("<4sBBBBQQQ")  # magic, encoding, item size, planes, 0, elements, changed, escapes
SIZE = struct.Struct("<I")  # of one plane's frame; 0 = the plane is all zero
_CHECK = struct.Struct("<Q")  # xxh3-64 of everything before it
_local = threading.local()

Bits = np.ndarray[Any, Any]


class Planes(NamedTuple):
    """Where in a block the gaps and values of a pass lie, bytes."""

    short: int
    """uint8 [C]"""
    long: int
    """int32: gaps of 255 and more"""
    up_to: int
    """int32: how many of those up to the end of each piece that they hold"""
    values: int
    """uint8 [2, C], the lower bytes first"""
    changes: int
    """C"""


class Work(NamedTuple):
    """The changed pieces of one pass, as they lie in a block."""

    block: int
    planes: Planes | None
    pieces: list[tuple[int, int, int, int, int, int, int]]
    """(start, length, bytes of an element, first change in the planes, behind the last, where its old bits are, where
    its new): the planes hold what is needed, and the last two are -1, or those two say where all of it is."""


def unsigned(itemsize: int) -> np.dtype[Any]:
    return np.dtype(f"<u{itemsize}")


def planes_of(values: Bits) -> list[Bits]:
    """[n] numbers -> one uint8 [n] array per byte, lowest byte first."""
    table = values.view(np.uint8).reshape(-1, values.itemsize)
    return [np.ascontiguousarray(table[:, k]) for k in range(values.itemsize)]


def join(planes: list[Bits]) -> Bits:
    table = np.empty((len(planes[0]), len(planes)), np.uint8)
    for k, plane in enumerate(planes):
        table[:, k] = plane
    return table.reshape(-1).view(unsigned(len(planes)))


def list_planes(short: Bits | None, long: Bits | None, values: list[Bits]) -> list[Bits]:
    """In the order in which they stand in the payload."""
    gaps: list[Bits] = [] if short is None else [short]
    if long is not None and len(long):
        gaps += planes_of(long.astype("<u4"))
    return gaps + values


def put_together(
    encoding: str, length: int, count: int, escapes: int, itemsize: int, frames: Sequence[bytes | memoryview]
) -> bytes:
    """A payload from its compressed planes."""
    head = HEADER.pack(MAGIC, ENCODINGS[encoding], itemsize, len(frames), 0, length, count, escapes)
    body = b"".join([head, *(SIZE.pack(len(frame)) for frame in frames), *frames])
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def open_planes(
    payload: bytes | memoryview, encoding: str, count: int, length: int, itemsize: int
) -> tuple[list[memoryview], int]:
    """The compressed planes of a payload and its number of escapes, after every check that needs no decompression."""
    view = memoryview(payload)
    if len(view) < HEADER.size + _CHECK.size:
        raise WeightCorrupt(f"a payload of {len(view)} bytes is shorter than its header")
    body = view[: -_CHECK.size]
    if xxhash.xxh3_64_intdigest(body) != _CHECK.unpack(view[-_CHECK.size :])[0]:
        raise WeightCorrupt(f"a payload of {len(view)} bytes fails its checksum")
    magic, code, size, number, zero, elements, changed, escapes = HEADER.unpack_from(body)
    expected = (MAGIC, ENCODINGS.get(encoding), itemsize, 0, length, count)
    if (magic, code, size, zero, elements, changed) != expected:
        found = (magic, code, size, zero, elements, changed)
        raise WeightCorrupt(f"payload header {found}, the manifest says {expected}")
    if not 0 < count <= length <= MAX_PIECE or escapes > count:
        raise WeightCorrupt(f"payload with {count} changes and {escapes} long gaps among {length} elements")
    gap_planes = 0 if encoding.startswith("dense-") else 5 if escapes else 1
    if number != gap_planes + itemsize or (escapes and not gap_planes):
        raise WeightCorrupt(f"payload with {number} planes for `{encoding}` of {itemsize}-byte elements")
    at = HEADER.size + number * SIZE.size
    if len(body) < at:
        raise WeightCorrupt(f"a payload of {len(view)} bytes ends inside its table of planes")
    planes = []
    for (frame,) in SIZE.iter_unpack(body[HEADER.size : at]):
        planes.append(body[at : at + frame])
        at += frame
    if at != len(body):
        raise WeightCorrupt(f"payload planes end at byte {at} of {len(body)}")
    return planes, escapes


def indices_of(planes: list[memoryview], count: int, escapes: int, length: int) -> Bits:
    """int64 [C], strictly increasing by construction, checked to end inside the piece."""
    short = inflate(planes[0], count)
    steps = short.astype(np.int64)
    long = short == ESCAPE
    if int(np.count_nonzero(long)) != escapes:
        raise WeightCorrupt(f"payload with {np.count_nonzero(long)} escaped gaps, its header says {escapes}")
    if escapes:
        values = join([inflate(frame, escapes) for frame in planes[1:5]])
        if int(values.min()) < ESCAPE:
            raise WeightCorrupt(f"payload with a gap of {values.min()} in its list of long gaps")
        steps[long] = values
    steps += 1
    indices = np.cumsum(steps, out=steps)
    indices -= 1
    if indices[-1] >= length:
        raise WeightCorrupt(f"payload reaches element {indices[-1]} of {length}")
    return indices


def deflate(plane: Bits, level: int) -> bytes:
    if not plane.any():
        return b""
    frame: bytes = _compressor(level).compress(plane.data)
    return frame


def deflate_many(planes: Sequence[Bits], level: int, threads: int) -> list[bytes | memoryview]:
    """What `deflate` makes of each, in threads of zstd's own: Python's would hand the interpreter to one another for
    every plane. `planes`: contiguous."""
    busy = [k for k, plane in enumerate(planes) if plane.any()]
    found: list[bytes | memoryview] = [b""] * len(planes)
    if not busy:
        return found
    frames = _compressor(level).multi_compress_to_buffer([planes[k].data for k in busy], threads=threads)
    for k, frame in zip(busy, frames, strict=True):
        found[k] = memoryview(frame)
    return found


def _compressor(level: int) -> Any:
    cache: dict[int, Any] = _local.__dict__.setdefault("compressors", {})
    if level not in cache:
        cache[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    return cache[level]


def inflate(frame: memoryview, size: int) -> Bits:
    """uint8 [size]; the frame must announce exactly that size, so that no frame can ask for more memory."""
    if not len(frame):
        return np.zeros(size, np.uint8)
    decompressor = _local.__dict__.setdefault("decompressor", zstandard.ZstdDecompressor())
    try:
        announced = zstandard.get_frame_parameters(frame).content_size
        if announced != size:
            raise WeightCorrupt(f"a plane of {announced} bytes where {size} belong")
        data = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WeightCorrupt(f"a plane that zstd cannot read: {error}") from error
    if len(data) != size:
        raise WeightCorrupt(f"a plane of {len(data)} bytes where {size} belong")
    return np.frombuffer(data, np.uint8)
