"""One rank's part of a version: payload files in the version directory, and the entries that describe them.

A rank writes the pieces of what it holds; nobody gathers. Parts travel between ranks as sealed JSON files in the
version directory, and rank 0 merges them into manifests.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from astracli.errors import RunFailed
from astracli.weights.device.host import chunks_of
from astracli.weights.format import codec, digest
from astracli.weights.format.manifest import LOW_RANK, FileEntry, Kind, Piece, TensorEntry, joint_encoding
from astracli.weights.publish.writing import HashingFile

if TYPE_CHECKING:
    import torch

    from astracli.weights.publish.encoder import EncoderProcess

PIECE = 1 << 22
"""Elements of a delta piece, at most: bounds the encoder's memory and keeps it in the cache."""

_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

Bits = np.ndarray[Any, Any]
Factors = Mapping[str, "tuple[torch.Tensor, torch.Tensor]"]
"""{HF name: A [R, I] and scaled B [O, R], fp32 on the CPU}"""


@dataclass(frozen=True)
class Local:
    """A contiguous range of one flattened tensor, as this rank holds it."""

    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    flat: torch.Tensor
    """[length], contiguous, in its wire dtype, on its own device."""

    def __len__(self) -> int:
        return len(self.flat)

    @property
    def bits(self) -> Bits:
        """uint16 or uint32 [length] on the host: a view of a CPU tensor, a copy of any other."""
        return digest.bits_of(self.flat.cpu())

    @property
    def whole(self) -> bool:
        return self.start == 0 and len(self) == prod(self.shape)


@dataclass
class PartTensor:
    """What a rank says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    lanes: str
    """Digest of the local range, at its place."""
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Part:
    """What one rank wrote for one kind of payload."""

    kind: Kind
    tensors: dict[str, PartTensor] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    diff_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0

    @classmethod
    def from_doc(cls, doc: dict[str, Any]) -> Part:
        tensors = {
            name: PartTensor(**{**t, "shape": tuple(t["shape"]), "pieces": [Piece(**p) for p in t["pieces"]]})
            for name, t in doc["tensors"].items()
        }
        files = {name: FileEntry(**f) for name, f in doc["files"].items()}
        return cls(**{**doc, "tensors": tensors, "files": files})

    def to_doc(self) -> dict[str, Any]:
        tensors = {name: vars(t) | {"pieces": [vars(p) for p in t.pieces]} for name, t in self.tensors.items()}
        return vars(self) | {"tensors": tensors, "files": {name: vars(file) for name, file in self.files.items()}}


def described(tensors: Mapping[str, Local], lanes: Mapping[str, str]) -> dict[str, PartTensor]:
    """What this rank says of its tensors, before any of their pieces is written. `lanes`: their digests."""
    return {name: PartTensor(t.dtype, t.shape, t.start, len(t), lanes[name]) for name, t in tensors.items()}


def write_delta(
    directory: Path, rank: int, tensors: Mapping[str, Local], base: Mapping[str, Local], lanes: Mapping[str, str],
    level: int, run: Callable[..., Iterable[Any]] = map, encoder: EncoderProcess | None = None,
) -> Part:  # fmt: skip
    """Encode what changed from `base` into `delta-RANK.bin`. `run` maps over pieces on a CPU: `map`, or a thread
    pool's; what lies on a GPU is compared there, and `encoder` codes and writes it."""
    part = Part("delta", described(tensors, lanes))
    path = directory / f"delta-{rank:05d}.bin"
    if any(local.flat.device.type != "cpu" for local in tensors.values()):
        assert encoder is not None
        by_gpu(part, path, tensors, base, level, encoder)
        return part
    out = HashingFile(path)
    for (name, at, _, new), encoded, diff_s, encode_s in run(partial(_coded, level), _pieces(tensors, base)):
        part.diff_s += diff_s
        part.encode_s += encode_s
        if not encoded.count:
            continue
        begin = time.perf_counter()
        offset = out.write(encoded.payload)
        checksum = xxhash.xxh3_128_hexdigest(encoded.payload)
        where = (tensors[name].start + at, len(new), path.name, offset, len(encoded.payload), checksum)
        part.tensors[name].pieces.append(Piece(*where, encoded.encoding, encoded.count))
        part.write_s += time.perf_counter() - begin
    part.files = out.close()
    return part


def by_gpu(
    part: Part, path: Path, tensors: Mapping[str, Local], base: Mapping[str, Local], level: int, encoder: EncoderProcess
) -> None:  # fmt: skip
    from astracli.weights.device.difference import compared

    # a base on the host (the first version, and that of a trainer that left its GPU) goes back a tensor at a time
    pairs = ((name, base[name].flat, local.flat) for name, local in tensors.items())
    for name, found in encoder.code(path, level, compared(pairs, PIECE, encoder.block)):
        where = (tensors[name].start + found.start, found.length, path.name, found.offset, found.size, found.checksum)
        part.tensors[name].pieces.append(Piece(*where, found.encoding, found.changes))
    part.files = encoder.files
    part.diff_s, part.encode_s, part.write_s = encoder.diff_s, encoder.encode_s, encoder.write_s


_Pair = tuple[str, int, Bits, Bits]
"""(tensor, start in its local range, old bits, new bits) of one piece."""


def _pieces(tensors: Mapping[str, Local], base: Mapping[str, Local]) -> Iterator[_Pair]:
    for name, local in tensors.items():
        old, new = base[name].bits, local.bits
        for at in range(0, len(local), PIECE):
            yield name, at, old[at : at + PIECE], new[at : at + PIECE]


def _coded(level: int, pair: _Pair) -> tuple[_Pair, codec.Encoded, float, float]:
    """(the piece, what is written of it, seconds of comparing, seconds of coding)"""
    _, _, old, new = pair
    begin = time.perf_counter()
    indices = codec.changed_indices(old, new)
    middle = time.perf_counter()
    encoded = codec.encode_changed(old, new, indices, level)
    return pair, encoded, middle - begin, time.perf_counter() - middle


def write_adapter(
    directory: Path, rank: int, tensors: Mapping[str, Local], lanes: Mapping[str, str], factors: Factors
) -> Part:  # fmt: skip
    """Write both factors of every tensor with an adapter into `adapter-RANK.bin`. Every rank says what it holds of the
    merged tensors; rank 0 writes."""
    part, begin = Part("adapter", described(tensors, lanes)), time.perf_counter()
    if rank:
        return part
    out = HashingFile(path := directory / f"adapter-{rank:05d}.bin")
    for name, (a_RI, b_OR) in factors.items():
        payload = b"".join(factor.numpy().astype("<f4").tobytes() for factor in (a_RI, b_OR))
        count = prod(tensors[name].shape)
        offset, checksum = out.write(payload), xxhash.xxh3_128_hexdigest(payload)
        where = (0, count, path.name, offset, len(payload), checksum)
        part.tensors[name].pieces = [Piece(*where, LOW_RANK, count)]
    part.files = out.close()
    part.write_s = time.perf_counter() - begin
    return part


def write_full(
    directory: Path, rank: int, tensors: Mapping[str, Local], lanes: Mapping[str, str],
    run: Callable[..., Iterable[Any]] = map,
) -> Part:  # fmt: skip
    """All of what this rank holds as `full-RANK.safetensors`, under HF names. `run` maps over chunks, as above.

    A rank that holds a tensor whole stores it in its shape, so that one rank's file loads anywhere; a shard is stored
    flat, and only the manifest says where it belongs. Nothing is compressed: bf16 weights do not get small enough.
    """
    part, begin = Part("full", described(tensors, lanes)), time.perf_counter()
    path = directory / f"full-{rank:05d}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    order = sorted(tensors, key=lambda name: (-tensors[name].flat.element_size(), name))  # as safetensors aligns them
    head = _safetensors_head({name: tensors[name] for name in order})
    whole, at = xxhash.xxh3_128(head), len(head)
    with open(temporary, "wb", buffering=0) as file:
        file.write(head)

        def chunks() -> Iterator[tuple[int, int, Bits, Callable[[], None]]]:
            """Every chunk to be written, hashed here while it is in the cache."""
            nonlocal at
            for name in order:
                local, own, start = tensors[name], xxhash.xxh3_128(), at
                for bits, free in chunks_of(local.flat):
                    whole.update(bits.data)
                    own.update(bits.data)
                    yield file.fileno(), at, bits, free
                    at += bits.nbytes
                if at > start:
                    where = (local.start, len(local), path.name, start, at - start)
                    part.tensors[name].pieces = [Piece(*where, own.hexdigest(), "raw", len(local))]

        try:
            failed = [error for error in run(_write_at, chunks()) if error is not None]
            if failed:  # not before the other threads have ended: they write to this file
                raise failed[0]
        except BaseException:
            temporary.unlink()
            raise
    os.replace(temporary, path)
    part.files = {path.name: FileEntry(at, whole.hexdigest())}
    part.write_s = time.perf_counter() - begin
    return part


def _safetensors_head(tensors: Mapping[str, Local]) -> bytes:
    """Everything before the tensors' bytes: the header's length, the header, spaces up to a multiple of 8."""
    doc: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, local in tensors.items():
        size = len(local) * local.flat.element_size()
        shape = list(local.shape) if local.whole else [len(local)]
        doc[name] = {"dtype": _SAFETENSORS[local.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(doc, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_at(job: tuple[int, int, Bits, Callable[[], None]]) -> OSError | None:
    """The error is given back: raised, it would cancel jobs that hold a buffer."""
    handle, at, bits, free = job
    view = bits.data.cast("B")
    try:
        while view:
            done = os.pwrite(handle, view, at)
            view, at = view[done:], at + done
    except OSError as error:
        return error
    finally:
        free()
    return None


def merge(parts: list[Part]) -> tuple[TensorEntry, ...]:
    """The tensors of all ranks' parts. Raises RunFailed when their ranges do not tile every tensor exactly once."""
    names = dict.fromkeys(name for part in parts for name in part.tensors)
    return tuple(_merge_tensor(name, [p.tensors[name] for p in parts if name in p.tensors]) for name in names)


def _merge_tensor(name: str, found: list[PartTensor]) -> TensorEntry:
    found = sorted(found, key=lambda t: (t.start, t.length))
    kinds = {(t.dtype, t.shape) for t in found}
    if len(kinds) != 1:
        raise RunFailed(f"ranks disagree on `{name}`: {sorted(kinds)}")
    (dtype, shape), end = kinds.pop(), 0
    for t in found:
        if t.length and t.start != end:
            raise RunFailed(
                f"ranks hold `{name}` up to element {end} and again from {t.start}",
                "give every element of a tensor to the publisher on exactly one rank",
            )
        end += t.length
    if end != prod(shape):
        raise RunFailed(f"ranks hold {end} elements of `{name}`, whose shape is {list(shape)}")
    lanes = reduce(digest.add, (digest.from_hex(t.lanes) for t in found), digest.ZERO)
    pieces = tuple(p for t in found for p in t.pieces)
    count = sum(p.count for p in pieces)
    return TensorEntry(name, dtype, shape, joint_encoding(pieces), count, digest.to_hex(lanes), pieces)
