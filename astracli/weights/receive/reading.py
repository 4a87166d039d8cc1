"""What is staged, read and checked: plan, manifests, payload files. Touches no weight and needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from astracli.weights import WeightCorrupt
from astracli.weights.format import codec, low_rank
from astracli.weights.format.flat import FlatStep, flatten
from astracli.weights.format.manifest import BASE_BYTES, LOW_RANK, BaseFile, Manifest, Piece, TensorEntry, unseal

NEXT = "next.json"
RESULT = "result.json"
READBACK = "readback.json"
_CHUNK = 1 << 20
"""Bytes hashed at a time, for the file and for the piece while they are in the cache."""


class Base(NamedTuple):
    """Where a tensor without its adapter lies: a range of a file of the model that the run started from."""

    folder: Path
    place: BaseFile

    def bits(self, tensor: TensorEntry) -> np.ndarray[Any, Any]:
        """uint16 or uint32 [numel], rounded to the tensor's dtype. Raises WeightCorrupt naming the file."""
        path, width = self.folder / self.place.file, BASE_BYTES[self.place.dtype]
        try:
            raw = np.memmap(path, np.uint8, "r", self.place.offset, (tensor.numel * width,))
        except (OSError, ValueError) as error:
            raise WeightCorrupt(
                f"cannot read `{tensor.name}` of the model in `{path}`: {error}",
                "the model that the run started from must stay where it was",
            ) from error
        if self.place.dtype == "BF16" and tensor.itemsize == 2:
            return raw.view("<u2")
        kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
        values = raw.view(kinds[self.place.dtype])
        wide = low_rank.widened(values) if self.place.dtype == "BF16" else values.astype(np.float32)
        return low_rank.rounded(wide, tensor.itemsize)


class CheckedPiece(NamedTuple):
    """One checked piece, as it lies in its file."""

    tensor: TensorEntry
    piece: Piece
    path: Path
    blob: np.ndarray[Any, Any]
    """uint8, mapped."""
    base: Base | None = None
    """Of an adapter: what it is merged into."""


@dataclass
class Prepared:
    """A staged plan, decoded. Only a full version still needs its files, until `hold` or `Resident.stage` has read
    them."""

    plan: bytes
    """The next.json that it came from."""
    version: int
    kind: str
    base_version: int | None
    model_path: str | None
    manifests: list[Manifest] = field(default_factory=list)
    """Without their pieces, when another process read them."""
    flat: list[FlatStep] = field(default_factory=list)
    """What changes, a step for each manifest, in the order of applying. Given up once it is `loaded`."""
    bytes: int = 0
    """Of all payloads."""
    loaded: Any = None
    """The same on the weights' device, once `Resident.load` has brought it there."""
    loaded_by: Any = None
    """The `Resident` that loaded it: it fits the weights of that one alone."""
    decode_s: float = 0.0
    load_s: float = 0.0

    @property
    def brings_tensors(self) -> bool:
        """Whether whole tensors are copied to the weights, not changes scattered over them."""
        return self.kind in ("full", "adapter")


def prepare(stage_dir: Path) -> Prepared:
    """Read and decode what `next.json` names. Touches no weight. Raises WeightCorrupt naming the file."""
    begin = time.perf_counter()
    prepared, steps = open_plan(stage_dir)
    prepared.flat = [flatten([(c.tensor.name, c.piece.start, decode(c)) for c in step]) for step in steps]
    prepared.decode_s = time.perf_counter() - begin
    return prepared


def hold(prepared: Prepared) -> None:
    """Read the bits of a full version out of its files, so that applying it reads memory alone."""
    begin = time.perf_counter()
    for step in prepared.flat:
        step.raws = [r._replace(bits=np.array(r.bits)) if isinstance(r.bits, np.memmap) else r for r in step.raws]
    prepared.load_s += time.perf_counter() - begin


def open_plan(stage_dir: Path) -> tuple[Prepared, list[list[CheckedPiece]]]:
    """The plan without its changes, and the checked pieces of each step. Raises WeightCorrupt naming the file."""
    stage_dir = Path(stage_dir)
    blob = read(stage_dir / NEXT)
    plan = unseal(blob, f"`{NEXT}`")
    if plan.keys() != {"version", "kind", "base_version", "steps", "model_path"}:
        raise WeightCorrupt(f"`{NEXT}` is no plan: it has {', '.join(sorted(plan))}")
    prepared = Prepared(blob, plan["version"], plan["kind"], plan["base_version"], plan["model_path"])
    at, steps = plan["base_version"], []
    for step in plan["steps"]:
        path = stage_dir / step
        manifest = Manifest.from_bytes(read(path), f"`{step}`")
        if manifest.base_version is not None and manifest.base_version != at:
            raise WeightCorrupt(f"`{step}` changes version {manifest.base_version}, the step before it ends at {at}")
        if manifest.kind == "full" and prepared.manifests:
            raise WeightCorrupt(f"`{step}` is a full version behind other steps")
        at = manifest.version
        steps.append(list(_checked(path.parent, manifest, prepared.model_path)))
        prepared.manifests.append(manifest)
        prepared.bytes += sum(piece.bytes for tensor in manifest.tensors for piece in tensor.pieces)
    if at != prepared.version:
        raise WeightCorrupt(f"the staged steps end at version {at}, not {prepared.version}")
    if any(_identity(m) != _identity(prepared.manifests[0]) for m in prepared.manifests):
        raise WeightCorrupt("the staged steps are not of the same tensors")
    return prepared, steps


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightCorrupt(f"cannot read staged `{path.name}`: {error.strerror}") from error


def decode(coded: CheckedPiece) -> codec.DecodedPiece:
    """What a piece does. Raises WeightCorrupt naming tensor and file."""
    tensor, piece, path, blob, base = coded
    if base is not None:
        outputs, inputs = tensor.shape
        a, b = np.split(blob.view("<f4"), [piece.bytes // 4 // sum(tensor.shape) * inputs])
        bits = low_rank.merged_bits(base.bits(tensor), a.reshape(-1, inputs), b.reshape(outputs, -1))
        return codec.DecodedPiece("raw", piece.length, None, bits)
    if piece.encoding == "raw":
        return codec.DecodedPiece("raw", piece.length, None, blob.view(f"<u{tensor.itemsize}"))
    try:
        return codec.decode(blob.data, piece.encoding, piece.count, piece.length, tensor.itemsize)
    except WeightCorrupt as error:
        raise WeightCorrupt(f"`{tensor.name}` in `{path.name}` of `{path.parent.name}`: {error}") from error


def _identity(manifest: Manifest) -> list[Any]:
    return [manifest.model, *((t.name, t.dtype, t.shape) for t in manifest.tensors)]


def _checked(directory: Path, manifest: Manifest, model_path: str | None) -> Iterator[CheckedPiece]:
    """All pieces in the manifest's order, once every file and every piece has its checksum."""
    mapped: dict[str, np.ndarray[Any, Any]] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.files}
    for tensor in manifest.tensors:
        for piece in tensor.pieces:
            pieces[piece.file].append(piece)
    for name, entry in manifest.files.items():
        try:
            mapped[name] = np.memmap(directory / name, np.uint8, "r") if entry.bytes else np.zeros(0, np.uint8)
        except (OSError, ValueError) as error:
            raise WeightCorrupt(f"cannot read staged `{name}` of version {manifest.version}: {error}") from error
        if len(mapped[name]) != entry.bytes or not _sound(mapped[name], entry.xxh3, pieces[name]):
            raise WeightCorrupt(f"staged `{name}` of version {manifest.version} fails its checksum")
    for tensor in manifest.tensors:
        for piece in tensor.pieces:
            blob = mapped[piece.file][piece.offset : piece.offset + piece.bytes]
            base = None
            if piece.encoding == LOW_RANK:
                if model_path is None:
                    raise WeightCorrupt(f"an adapter of version {manifest.version}, and no model to merge it into")
                base = Base(Path(model_path), manifest.base[tensor.name])
            yield CheckedPiece(tensor, piece, directory / piece.file, blob, base)


def _sound(file: np.ndarray[Any, Any], xxh3: str, pieces: list[Piece]) -> bool:
    """Whether a file and its pieces have their checksums: in one pass, pieces in the order of their offsets."""
    view, whole, at = file.data, xxhash.xxh3_128(), 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        own, end = xxhash.xxh3_128(), piece.offset + piece.bytes
        if piece.offset < at:  # no publisher shares bytes between pieces
            return False
        whole.update(view[at : piece.offset])
        for start in range(piece.offset, end, _CHUNK):
            chunk = view[start : min(end, start + _CHUNK)]
            whole.update(chunk)
            own.update(chunk)
        if own.hexdigest() != piece.xxh3:
            return False
        at = end
    whole.update(view[at:])
    return bool(whole.hexdigest() == xxh3)
