"""Commits a version: ranks hand over what they wrote, rank 0 merges it into manifests and declares the version stable.

Order on disk: payload files and manifests under their final names, each by rename; `STABLE` last and synced. A reader
that looks only at what STABLE lists never sees half a version, whatever is killed when.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic
from astracli.weights.format.manifest import MANIFEST, STABLE, BaseFile, Manifest, seal, unseal
from astracli.weights.publish import payload


@dataclass(frozen=True)
class Committer:
    """One rank's side. All ranks have the same `session` and commit the same versions."""

    model_name: str
    rank: int
    world_size: int
    session: str
    """A text that no earlier attempt used; "" with one rank."""
    timeout_s: float
    """For another rank's part."""
    frozen: payload.Part
    """This rank's tensors that never change."""
    tied: Mapping[str, str]
    """Names that never travel -> those that do."""
    base: Mapping[str, BaseFile] = field(default_factory=dict)
    """Where tensors with an adapter lie without it."""

    def commit(
        self, directory: Path, version: int, base_version: int | None, parts: list[payload.Part]
    ) -> list[Manifest]:
        """The manifests of a version of which this rank wrote `parts`, once it is stable. Raises RunFailed when another
        rank's part does not come, or does not fit."""
        if self.rank:
            doc: dict[str, Any] = {"session": self.session, "version": version, "base_version": base_version}
            doc |= {"parts": [p.to_doc() for p in parts], "frozen": self.frozen.to_doc()}
            write_atomic(directory / f"rank-{self.rank:05d}.json", seal(doc))
            stable = self.wait_for(directory / STABLE, version)
            names = [m["file"] for m in stable["manifests"].values()]
            return [Manifest.from_bytes((directory / name).read_bytes(), name) for name in names]
        documents = [self.wait_for(directory / f"rank-{rank:05d}.json", version) for rank in range(1, self.world_size)]
        for rank, doc in enumerate(documents, 1):
            if doc["base_version"] != base_version or len(doc["parts"]) != len(parts):
                raise RunFailed(f"rank {rank} publishes {version} over {doc['base_version']}, not {base_version}")
        manifests = self._merge(version, base_version, parts, documents)
        self._declare_stable(directory, version, manifests)
        return manifests

    def wait_for(self, path: Path, version: int) -> dict[str, Any]:
        """Another rank's sealed file, of this session and version; a left-over of an earlier attempt is not it."""
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):  # rank 0 also removes an earlier attempt's STABLE
                doc = unseal(path.read_bytes(), str(path))
                if (doc["session"], doc["version"]) == (self.session, version):
                    return doc
            time.sleep(0.02)
        raise RunFailed(f"rank {self.rank} waited {self.timeout_s:g} s for `{path}`", "look at that rank's log")

    def _merge(
        self, version: int, base_version: int | None, parts: list[payload.Part], documents: list[dict[str, Any]]
    ) -> list[Manifest]:
        """One manifest for each of this rank's parts, of all ranks. `documents`: what the others handed over."""
        everyone = [self.frozen, *(payload.Part.from_doc(d["frozen"]) for d in documents)]
        frozen = {t.name: t.digest for t in payload.merge(everyone)}
        manifests = []
        for k, part in enumerate(parts):
            everyone = [part, *(payload.Part.from_doc(d["parts"][k]) for d in documents)]
            tensors, files = payload.merge(everyone), {n: f for p in everyone for n, f in p.files.items()}
            base = base_version if part.kind == "delta" else None
            digests = frozen | {t.name: t.digest for t in tensors}
            tied = {name: digests.get(source, "") for name, source in self.tied.items()}
            if missing := [name for name, value in tied.items() if not value]:
                raise RunFailed(f"tied to a tensor that is not published: {', '.join(missing)}")
            places = {t.name: self.base[t.name] for t in tensors if t.pieces} if part.kind == "adapter" else {}
            manifest = Manifest(self.model_name, version, base, part.kind, tensors, files, frozen | tied, places)
            manifests.append(manifest)
        return manifests

    def _declare_stable(self, directory: Path, version: int, manifests: list[Manifest]) -> None:
        files: dict[str, int] = {}
        kinds: dict[str, Any] = {}
        for manifest in manifests:
            name, blob = MANIFEST[manifest.kind], manifest.to_bytes()
            Manifest.from_bytes(blob, name)
            write_atomic(directory / name, blob)
            files |= {name: len(blob)} | {n: f.bytes for n, f in manifest.files.items()}
            kinds[manifest.kind] = {
                "file": name,
                "base_version": manifest.base_version,
                "bytes": manifest.payload_bytes,
                "xxh3": xxhash.xxh3_128_hexdigest(blob),
            }
        for path in directory.iterdir():
            if path.name not in files:  # other ranks have handed over: what is not listed is left over
                path.unlink()
        stable = {"version": version, "session": self.session, "manifests": kinds, "files": files}
        write_atomic(directory / STABLE, seal(stable), sync=True)
