"""The engine's side: apply what is staged to the weights in place, and prove the result before anything is served.

Everything is decoded and checked before the first weight is touched, so corrupt bytes leave the engine as it was. After
applying, the digest of every resulting tensor must be the manifest's. If one is not, the weights are wrong, and the
engine needs a full version before it serves again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from astracli.errors import AstraError
from astracli.process.atomic import write_atomic
from astracli.weights import WeightCorrupt, WeightMismatch
from astracli.weights.format.manifest import Manifest
from astracli.weights.receive.placement import EngineSlice, Target, placements
from astracli.weights.receive.reading import NEXT, READBACK, RESULT, Prepared, prepare, read
from astracli.weights.receive.resident import Resident


@dataclass(frozen=True)
class ApplyResult:
    version: int
    kind: str
    steps: int
    changed: int
    """Elements written, over all steps."""
    bytes: int
    """Payload bytes of all steps."""
    decode_s: float
    """Reading, checking and decoding; may have happened earlier, in `prepare`."""
    load_s: float
    """Bringing it to the weights' device; may have happened earlier."""
    apply_s: float
    verify_s: float


def apply(
    stage_dir: Path, tensors: Mapping[str, Target], have_version: int | None, prepared: Prepared | None = None,
    resident: Resident | None = None,
) -> ApplyResult:  # fmt: skip
    """Turn the weights in `tensors` (all that travel; frozen and tied ones may be among them) into the staged version.

    `have_version` is what they hold now, None when that is unknown. `resident` holds the same tensors; made for this
    call when not given. Writes `result.json` beside `next.json` either way.
    Raises WeightCorrupt (nothing was touched) or WeightMismatch (refused, or applied and wrong: resync in full).
    """
    stage_dir = Path(stage_dir)
    (stage_dir / RESULT).unlink(missing_ok=True)
    try:
        prepared = current(stage_dir, prepared)
        result = perform(prepared, tensors, have_version, resident)
    except (AstraError, ValueError) as error:
        raise fail(stage_dir, error if isinstance(error, AstraError) else WeightCorrupt(str(error))) from error
    succeed(stage_dir, result)
    return result


def current(stage_dir: Path, prepared: Prepared | None) -> Prepared:
    """What `next.json` names now: `prepared`, when that is it. Raises WeightCorrupt."""
    if prepared is None or prepared.plan != read(Path(stage_dir) / NEXT):
        return prepare(stage_dir)
    return prepared


def succeed(stage_dir: Path, result: ApplyResult, more: Mapping[str, Any] | None = None) -> None:
    """Write `result.json` for a version that was applied and proven."""
    doc = {"ok": True, "message": "", **asdict(result), **(more or {})}
    write_atomic(Path(stage_dir) / RESULT, json.dumps(doc).encode())


def write_readback(stage_dir: Path, doc: Mapping[str, Any]) -> None:
    """Write what a read-back under HF names found: `version`, `ok`, `message`, and seconds."""
    write_atomic(Path(stage_dir) / READBACK, json.dumps(doc).encode())


def fail(stage_dir: Path, error: AstraError) -> AstraError:
    """Write `result.json` for a version that could not be applied; gives the error back to be raised."""
    doc = {"ok": False, "version": None, "message": str(error), "error": type(error).__name__}
    write_atomic(Path(stage_dir) / RESULT, json.dumps(doc).encode())
    return error


# ---- one version -----------------------------------------------------------------------------------------------------


def perform(
    prepared: Prepared, tensors: Mapping[str, Target], have: int | None, resident: Resident | None = None
) -> ApplyResult:
    """`apply` without its files."""
    placed = {name: placements(target) for name, target in tensors.items()}
    if prepared.kind == "adapter" and have is None:
        raise WeightMismatch(
            "an adapter is staged, and it is not known which weights the engine holds", "fetch a full version first"
        )
    if not prepared.brings_tensors and prepared.base_version != have:
        raise WeightMismatch(
            f"the staged delta changes version {prepared.base_version}, the engine holds {have}",
            "fetch from the engine's own version, or in full",
        )
    if prepared.manifests:
        _check_tensors(prepared.manifests[-1], placed)
    resident = resident or Resident(placed)
    resident.load(prepared)
    begin = time.perf_counter()
    resident.apply(prepared)
    middle = time.perf_counter()
    if prepared.manifests:
        _check_digests(prepared, placed, resident)
    return ApplyResult(
        version=prepared.version,
        kind=prepared.kind,
        steps=len(prepared.manifests),
        changed=sum(m.changed for m in prepared.manifests),
        bytes=prepared.bytes,
        decode_s=prepared.decode_s,
        load_s=prepared.load_s,
        apply_s=middle - begin,
        verify_s=time.perf_counter() - middle,
    )


def _check_tensors(manifest: Manifest, placed: Mapping[str, Sequence[EngineSlice]]) -> None:
    """The engine holds exactly the tensors of the manifest, whole and in the wire dtype."""
    wanted = {t.name: t for t in manifest.tensors}
    if missing := sorted(wanted.keys() - placed.keys()):
        raise WeightMismatch(f"the engine lacks {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:5])}")
    if unknown := sorted(placed.keys() - wanted.keys() - manifest.frozen_digests.keys()):
        raise WeightMismatch(f"{len(unknown)} tensors of the engine are not in the manifest: {', '.join(unknown[:5])}")
    for name, tensor in wanted.items():
        end = 0
        for place in placed[name]:
            dtype = str(place.view.dtype).removeprefix("torch.")
            if dtype != tensor.dtype or place.offset != end:
                raise WeightMismatch(
                    f"the engine holds `{name}` in {dtype} from element {place.offset}, "
                    f"the wire in {tensor.dtype} from element {end}"
                )
            end = place.end
        if end != tensor.numel:
            raise WeightMismatch(f"the engine holds {end} elements of `{name}`, the manifest {tensor.numel}")


def _check_digests(prepared: Prepared, placed: Mapping[str, Sequence[EngineSlice]], resident: Resident) -> None:
    manifest = prepared.manifests[-1]
    frozen_here = [name for name in manifest.frozen_digests if name in placed]
    found = resident.digests([*(t.name for t in manifest.tensors), *frozen_here])
    wrong = [t.name for t in manifest.tensors if found[t.name] != t.digest]
    if wrong:
        raise WeightMismatch(
            f"version {prepared.version}: {len(wrong)} of {len(manifest.tensors)} tensors have the wrong digest: "
            f"{', '.join(wrong[:5])}",
            "the engine must not serve before a full version is applied",
        )
    frozen = [name for name in frozen_here if found[name] != manifest.frozen_digests[name]]
    if frozen:
        raise WeightMismatch(
            f"version {prepared.version}: frozen tensors differ from the trainer's: {', '.join(frozen[:5])}",
            f"the engine must start from {prepared.model_path or 'the model the trainer started from'}",
        )
