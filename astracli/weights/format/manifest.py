"""The manifest of one version: which tensors, in which pieces, with which digests; sealed with its own hash.

A version directory holds `manifest.json` (a delta from `base_version`) and/or `manifest.full.json`, the payload files
they name, and `STABLE`, written last: what is not listed there does not exist for anyone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import xxhash

from astracli.config import reading
from astracli.weights import WeightCorrupt

FORMAT = 1
MANIFEST = {"delta": "manifest.json", "full": "manifest.full.json", "adapter": "manifest.adapter.json"}
STABLE = "STABLE"
NONCE = "NONCE"
"""File in the weights directory with a random text of the server's; whoever can read it there shares the disk."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""The dtypes that travel, and their width."""
DELTA_ENCODINGS = frozenset({"none", "gap-ulp", "gap-xor", "dense-ulp", "dense-xor", "dense-raw", "mixed"})

LOW_RANK = "low-rank"
"""Encoding of an adapter's pieces: A [R, I], then scaled B [O, R], both fp32, of the whole tensor [O, I]."""
BASE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""Dtypes of a safetensors file that a receiver can merge an adapter into, and their width."""

Kind = Literal["full", "delta", "adapter"]
_BASE_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_HEX32 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one flattened tensor, and where its bytes lie."""

    start: int
    length: int
    file: str
    offset: int
    bytes: int
    xxh3: str
    """xxh3-128 of those bytes."""
    encoding: str
    """`raw` in a full version, else the codec's."""
    count: int
    """Changed elements; of a full version, all."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the resulting version. In a delta, ranges without a piece did not change."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    """That of its pieces; `none` without pieces, `mixed` when they differ."""
    count: int
    digest: str
    """Two lanes of the whole resulting tensor, 32 hexadecimal digits."""
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    xxh3: str
    """xxh3-128 of the whole file."""


@dataclass(frozen=True)
class BaseFile:
    """Where a tensor without its adapter lies, in the directory of the model that the run started from."""

    file: str
    offset: int
    """Bytes from the start of the file."""
    dtype: str
    """As safetensors writes it."""


@dataclass(frozen=True)
class Manifest:
    model: str
    version: int
    base_version: int | None
    """None for a full version, and for an adapter, which belongs to the weights that the run started from."""
    kind: Kind
    tensors: tuple[TensorEntry, ...]
    files: dict[str, FileEntry] = field(default_factory=dict)
    frozen_digests: dict[str, str] = field(default_factory=dict)
    """Tensors that never travel: frozen ones, and tied ones (the digest of what they are tied to)."""
    base: dict[str, BaseFile] = field(default_factory=dict)
    """Of an adapter: what each tensor with pieces is merged into."""

    @property
    def payload_bytes(self) -> int:
        """Of all payload files."""
        return sum(f.bytes for f in self.files.values())

    @property
    def changed(self) -> int:
        return sum(t.count for t in self.tensors)

    @property
    def elements(self) -> int:
        return sum(t.numel for t in self.tensors)

    def to_bytes(self) -> bytes:
        # not `asdict`, which copies every value: a trainer stands still for it
        tensors = [vars(t) | {"pieces": [vars(p) for p in t.pieces]} for t in self.tensors]
        files = {name: vars(file) for name, file in self.files.items()}
        doc = {"format": FORMAT, **vars(self), "tensors": tensors, "files": files}
        del doc["base"]
        if self.base:
            doc["base"] = {name: vars(place) for name, place in self.base.items()}
        return seal(doc)

    @classmethod
    def from_bytes(cls, blob: bytes, what: str = "manifest") -> Manifest:
        """Parse and check everything that can be checked without the payload. Raises WeightCorrupt naming `what`."""
        doc = unseal(blob, what)
        try:
            if doc.pop("format") != FORMAT:
                raise WeightCorrupt(f"{what} has another format than {FORMAT}", "publisher and engine need one version")
            tensors = tuple(
                TensorEntry(**{**t, "shape": tuple(t["shape"]), "pieces": tuple(Piece(**p) for p in t["pieces"])})
                for t in doc.pop("tensors")
            )
            files = {name: FileEntry(**f) for name, f in doc.pop("files").items()}
            base = {name: BaseFile(**place) for name, place in doc.pop("base", {}).items()}
            manifest = cls(tensors=tensors, files=files, base=base, **doc)
            problem = next(_problems(manifest), None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightCorrupt(f"{what} is not a manifest: {error!r}") from error
        if problem:
            raise WeightCorrupt(f"{what}: {problem}")
        return manifest


def _is_count(*values: Any) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def _problems(m: Manifest) -> Iterator[str]:
    if not _is_count(m.version) or m.kind not in MANIFEST or not isinstance(m.model, str):
        yield f"model {m.model!r}, version {m.version!r}, kind {m.kind!r}"
    if m.kind != "delta" and m.base_version is not None:
        yield f"{'a full version' if m.kind == 'full' else 'an adapter'} with base {m.base_version}"
    if set(m.base) != {tensor.name for tensor in m.tensors if tensor.pieces and m.kind == "adapter"}:
        yield "tensors to merge into that are not those with an adapter"
    for name, place in m.base.items():
        known = place.dtype in BASE_BYTES and _is_count(place.offset) and isinstance(place.file, str)
        if not known or not _BASE_FILE.fullmatch(place.file):
            yield f"tensor `{name}` is merged into {place}"
    if m.kind == "delta" and not (_is_count(m.base_version) and m.base_version < m.version):  # type: ignore[operator]
        yield f"version {m.version} with base {m.base_version!r}"
    for name, file in m.files.items():
        if not _FILE_NAME.fullmatch(name) or not _is_count(file.bytes) or not _HEX32.fullmatch(file.xxh3):
            yield f"file {name!r}: {file}"
    for name, digest in m.frozen_digests.items():
        if not name or not _HEX32.fullmatch(digest):
            yield f"frozen tensor {name!r} with digest {digest!r}"
    seen: set[str] = set(m.frozen_digests)
    for tensor in m.tensors:
        if tensor.name in seen:
            yield f"tensor `{tensor.name}` stands there twice"
        seen.add(tensor.name)
        yield from (f"tensor `{tensor.name}`: {problem}" for problem in _tensor_problems(m, tensor))


def _tensor_problems(m: Manifest, t: TensorEntry) -> Iterator[str]:
    if not t.name or t.dtype not in ITEM_BYTES or not _is_count(t.count, *t.shape) or not _HEX32.fullmatch(t.digest):
        yield f"dtype {t.dtype!r}, shape {t.shape}, count {t.count!r}, digest {t.digest!r}"
    end = covered = 0
    for p in t.pieces:
        if not _is_count(p.start, p.length, p.offset, p.bytes, p.count) or not _HEX32.fullmatch(p.xxh3):
            yield f"piece {p}"
        if p.start < end or p.start + p.length > t.numel or not 0 < p.count <= p.length:
            yield f"piece of {p.length} at {p.start} with {p.count} changes, after one that ends at {end}, of {t.numel}"
        if p.file not in m.files or p.offset + p.bytes > m.files[p.file].bytes:
            yield f"piece at byte {p.offset} of `{p.file}`, {p.bytes} bytes"
        if m.kind == "full" and (p.encoding != "raw" or p.bytes != p.length * t.itemsize or p.count != p.length):
            yield f"full piece of {p.length} elements, `{p.encoding}`, {p.bytes} bytes"
        if m.kind == "adapter" and not _is_low_rank(t, p):
            yield f"an adapter's piece of {p.length} elements of {t.shape}, `{p.encoding}`, {p.bytes} bytes"
        if m.kind == "delta" and p.encoding not in DELTA_ENCODINGS - {"none", "mixed"}:
            yield f"piece with encoding {p.encoding!r}"
        end = p.start + p.length
        covered += p.length
    if sum(p.count for p in t.pieces) != t.count or t.encoding != joint_encoding(t.pieces):
        yield f"{t.count} changes as `{t.encoding}`, its pieces disagree"
    if m.kind == "full" and covered != t.numel:
        yield f"pieces hold {covered} of {t.numel} elements"


def _is_low_rank(t: TensorEntry, p: Piece) -> bool:
    """Both factors of one rank, for all of a matrix."""
    whole = len(t.shape) == 2 and t.dtype != "float16" and (p.start, p.length, p.count) == (0, t.numel, t.numel)
    return whole and p.encoding == LOW_RANK and p.bytes > 0 and p.bytes % (4 * sum(t.shape)) == 0


def joint_encoding(pieces: tuple[Piece, ...] | list[Piece]) -> str:
    found = {p.encoding for p in pieces}
    return "none" if not found else found.pop() if len(found) == 1 else "mixed"


# ---- sealed JSON -----------------------------------------------------------------------------------------------------


def _canonical(doc: Any) -> bytes:
    return json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal(doc: dict[str, Any]) -> bytes:
    """Canonical JSON (sorted keys, no spaces, ASCII) with `hash`: xxh3-128 of the same without it."""
    return _canonical({**doc, "hash": xxhash.xxh3_128_hexdigest(_canonical(doc))})


def unseal(blob: bytes, what: str) -> dict[str, Any]:
    """The inverse of `seal`: exactly those bytes or WeightCorrupt naming `what`."""
    try:
        doc = json.loads(blob)
        sealed = doc.pop("hash")
        genuine = isinstance(doc, dict) and sealed == xxhash.xxh3_128_hexdigest(_canonical(doc)) and blob == seal(doc)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightCorrupt(f"{what} is not sealed JSON: {error!r}") from error
    if not genuine:
        raise WeightCorrupt(f"{what} fails its own hash")
    result: dict[str, Any] = doc
    return result


# ---- version directories ---------------------------------------------------------------------------------------------


def version_name(version: int) -> str:
    return f"v{version:06d}"


def versions_in(directory: Path) -> list[int]:
    """Versions that are STABLE, ascending."""
    found = directory.glob(f"v*/{STABLE}") if directory.is_dir() else ()
    return sorted(int(path.parent.name[1:]) for path in found if path.parent.name[1:].isdigit())


def read_stable(directory: Path, version: int) -> dict[str, Any]:
    """STABLE of a version: {"version", "session", "manifests": {kind: {"file", "base_version", "bytes", "xxh3"}},
    "files": {name: bytes}}; `bytes` of a kind are its payload's, `xxh3` its manifest's.

    Raises FileNotFoundError (not published, or pruned) or WeightCorrupt.
    """
    path = directory / version_name(version) / STABLE
    with reading.opened(path) as file:
        return unseal(file.read(), str(path))


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
