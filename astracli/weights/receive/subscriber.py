"""The receiver's side: fetch what leads from the engine's version to another, check it, stage it, name it in next.json.

Everything is checked by xxh3 before it is named, and `next.json` is written last, so that an engine never sees half a
stage. `download.py` brings the bytes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic
from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import STABLE, Manifest, hash_file, seal, unseal, version_name
from astracli.weights.receive.download import Downloader, Gone
from astracli.weights.receive.reading import NEXT, READBACK, RESULT
from astracli.weights.receive.watcher import decoded, watched


@dataclass(frozen=True)
class Route:
    """Which manifests lead to a version, and what they cost."""

    kind: Literal["delta", "full", "adapter", "none"]
    """`full` when the first step is a full version."""
    steps: tuple[tuple[int, str], ...]
    """(version, manifest file), in the order of applying."""
    bytes: int


@dataclass(frozen=True)
class StagedPlan:
    """What lies ready under the stage directory."""

    version: int
    kind: Literal["delta", "full", "adapter", "none"]
    steps: tuple[str, ...]
    """Manifests, relative to the stage directory."""
    bytes: int
    """Payload bytes of all steps."""
    downloaded: int
    """Bytes that came over the network in this call."""
    waited_s: float
    """Until the version was published."""
    transfer_s: float
    stage_s: float = 0.0
    """Until the engine, generating meanwhile, had it decoded."""
    linked: int = 0
    """Bytes that were linked or copied from the publisher's own disk instead."""


def choose_route(detail: dict[int, dict[str, Any]], target: int, have: int | None) -> Route:
    """The chain of deltas from `have`, or the newest full version and the deltas after it, whichever is fewer bytes; or
    an adapter, which goes on any version and, where `have` is not known, on the newest full one.

    `detail`: version -> {kind: {"file", "base_version", "bytes"}}. Raises RunFailed when nothing leads to `target`.
    """
    if have == target:
        return Route("none", (), 0)
    found: list[Route] = []
    steps: tuple[tuple[int, str], ...] = ()
    cost, at = 0, target
    while at in detail:
        kinds = detail[at]
        if "full" in kinds:
            found.append(Route("full", ((at, kinds["full"]["file"]), *steps), cost + kinds["full"]["bytes"]))
        if "delta" not in kinds:
            break
        steps = ((at, kinds["delta"]["file"]), *steps)
        cost += kinds["delta"]["bytes"]
        at = kinds["delta"]["base_version"]
        if at == have:
            found.append(Route("delta", steps, cost))
            break
    if target in detail and "adapter" in detail[target]:
        adapter = detail[target]["adapter"]
        last = (target, adapter["file"])
        if have is not None:
            found.append(Route("adapter", (last,), adapter["bytes"]))
        elif fulls := [v for v in detail if v < target and "full" in detail[v]]:
            full = max(fulls)
            before = detail[full]["full"]
            found.append(Route("full", ((full, before["file"]), last), before["bytes"] + adapter["bytes"]))
    if not found:
        raise RunFailed(
            f"nothing leads from version {have} to {target}; published are {sorted(detail)}",
            "raise weights.keep, or lower weights.full_interval",
        )
    return min(found, key=lambda route: route.bytes)


@dataclass
class Subscriber:
    """Fetches versions from `url` (the hub) into `stage_dir`, for one engine. One fetch at a time."""

    url: str
    token: str
    stage_dir: Path
    model_path: str | Path | None = None
    """Where the engine's frozen tensors come from; named in next.json for messages."""
    wait_s: float = 120.0
    """For a version that is not published yet."""
    retries: int = 8
    """Connection errors in a row without a new byte."""
    decode_wait_s: float = 60.0
    """For the engine's watcher to decode what is staged, so that the pause need not."""
    link_bytes: int | None = 8 << 20
    """A file of so many bytes or more is linked where publisher and stage share a disk; None: never."""
    _source: Downloader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stage_dir = Path(self.stage_dir)
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        self._source = Downloader(self.url, self.token, self.retries, self.link_bytes)

    def close(self) -> None:
        self._source.close()

    def fetch(self, target_version: int, have_version: int | None = None) -> StagedPlan:
        """Stage what turns `have_version` (None: nothing usable) into `target_version`.

        Raises RunFailed: not published in time, no way there, server unreachable, or a file twice corrupt.
        """
        begin = time.perf_counter()
        detail = self._await(target_version)
        waited = time.perf_counter() - begin
        self._source.downloaded = self._source.linked = 0
        try:
            return self._stage(choose_route(detail, target_version, have_version), target_version, waited)
        except Gone:  # pruned between the listing and the download: what is left may still hold a full version
            try:
                route = choose_route(self._source.listing(), target_version, None)
                return self._stage(route, target_version, waited)
            except Gone as error:
                raise RunFailed(f"version {target_version} was pruned while it was fetched: {error}") from None

    # ---- what there is ----

    def _await(self, target: int) -> dict[int, dict[str, Any]]:
        deadline, pause = time.monotonic() + self.wait_s, 0.02
        while True:
            detail = self._source.listing()
            if target in detail:
                return detail
            newest = max(detail, default=None)
            if newest is not None and newest > target:
                raise RunFailed(f"version {target} is not there any more; the newest is {newest}")
            if time.monotonic() > deadline:
                raise RunFailed(f"waited {self.wait_s:g} s for version {target}; the newest is {newest}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    # ---- staging ----

    def _stage(self, route: Route, target: int, waited: float) -> StagedPlan:
        begin = time.perf_counter()
        bases = [self._step(version, name).base_version for version, name in route.steps]
        steps = [f"{version_name(version)}/{name}" for version, name in route.steps]
        for old in (RESULT, READBACK):
            (self.stage_dir / old).unlink(missing_ok=True)
        sealed = self._name(target, route.kind, steps, bases[0] if bases else target, self.model_path)
        keep = {version_name(version) for version, _ in route.steps}
        for path in self.stage_dir.glob("v*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        seconds = time.perf_counter() - begin
        stage_s = self._await_decoded(sealed)
        plain = (target, route.kind, tuple(steps), route.bytes, self._source.downloaded, waited, seconds, stage_s)
        return StagedPlan(*plain, linked=self._source.linked)

    def _await_decoded(self, plan: bytes) -> float:
        begin = time.monotonic()
        while decoded(self.stage_dir, plan) is None and time.monotonic() - begin < self.decode_wait_s:
            time.sleep(0.005)
        return time.monotonic() - begin

    @property
    def watched(self) -> bool:
        """Whether a thread of the engine decodes what is staged."""
        return watched(self.stage_dir)

    def wake(self, version: int) -> None:
        """Stage a plan that changes nothing: when the engine that holds `version` is asked to apply it, our loader gets
        to run in it for the first time, and decodes ahead from then on."""
        self._name(version, "none", [], version, None)

    def _name(
        self, version: int, kind: str, steps: list[str], base: int | None, model_path: str | Path | None
    ) -> bytes:  # fmt: skip
        """Write `next.json`; what it holds."""
        plan = {"version": version, "kind": kind, "steps": steps, "base_version": base}
        sealed = seal(plan | {"model_path": str(Path(model_path).resolve()) if model_path else None})
        write_atomic(self.stage_dir / NEXT, sealed)
        return sealed

    def readback(self, version: int) -> dict[str, float]:
        """Wait for the read-back of `version` under HF names, which the engine makes while it generates. -> seconds:
        `readback_s`, and in it `readback_wait_s`, `readback_place_s`, `readback_tables_s`, `readback_launch_s`,
        `readback_device_s`.

        Raises RunFailed when it found other weights than the trainer's, or did not come within `decode_wait_s`.
        """
        deadline = time.monotonic() + self.decode_wait_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                doc = json.loads((self.stage_dir / READBACK).read_bytes())
                if doc["version"] == version and doc["ok"]:
                    seconds = {name: float(value) for name, value in doc.items() if name.endswith("_s")}
                    return {n if n == "readback_s" else f"readback_{n}": value for n, value in seconds.items()}
                if doc["version"] == version:
                    raise RunFailed(f"version {version}: {doc['message']}")
            time.sleep(0.005)
        raise RunFailed(f"the engine did not read version {version} back within {self.decode_wait_s:g} s")

    def _step(self, version: int, name: str) -> Manifest:
        directory = self.stage_dir / version_name(version)
        directory.mkdir(exist_ok=True)
        stable = unseal(self._source.get(self._source.address(version, STABLE)).content, f"STABLE of version {version}")
        hashes = {kind["xxh3"] for kind in stable["manifests"].values()}
        self._file(version, name, stable["files"].get(name, 0), hashes)
        manifest = Manifest.from_bytes((directory / name).read_bytes(), f"`{name}` of version {version}")
        for file, entry in manifest.files.items():
            self._file(version, file, entry.bytes, {entry.xxh3})
        return manifest

    def _file(self, version: int, name: str, size: int, hashes: set[str]) -> None:
        """One file under its final name, with one of these xxh3-128. A corrupt one is fetched again, once."""
        path = self.stage_dir / version_name(version) / name

        def check() -> None:
            if hash_file(path) not in hashes:
                raise WeightCorrupt(f"`{name}` of version {version} fails its checksum")

        if path.exists():  # staged earlier, perhaps by a fetch that was cut short
            try:
                return check()
            except WeightCorrupt:
                path.unlink()
        for attempt in (1, 2):
            try:
                if attempt == 2 or not self._source.link(version, name, size, path):
                    self._source.fetch(version, name, size, path)
                return check()
            except WeightCorrupt as error:
                path.unlink(missing_ok=True)
                if attempt == 2:
                    raise WeightCorrupt(
                        f"`{name}` of version {version} arrived corrupt twice: {error}",
                        "the file is damaged on the publisher's disk, or the network changes bytes",
                    ) from error
