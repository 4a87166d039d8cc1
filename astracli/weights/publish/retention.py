"""Which published versions stay on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from astracli.weights.format.manifest import STABLE, read_stable, version_name, versions_in


def prune(directory: Path, newest: int, keep: int, pinned: Callable[[int], bool]) -> None:
    """Keep the newest `keep`, and what a receiver with nothing needs to reach the newest or a pinned version.

    A file that a receiver has linked stays with it.
    """
    present = versions_in(directory)
    kept = set(present[-keep:])
    for needed in [newest, *(v for v in present if pinned(v))]:
        target: int | None = needed
        while target is not None and target in present:
            kept.add(target)
            kinds = read_stable(directory, target)["manifests"]
            if "full" in kinds:
                break
            if "delta" in kinds:
                target = kinds["delta"]["base_version"]
            else:  # an adapter goes on any version, so one with all weights will do
                target = _newest_full(directory, [v for v in present if v < target])
    for version in present:
        if version not in kept:
            remove(directory, version)


def _newest_full(directory: Path, versions: list[int]) -> int | None:
    return next((v for v in reversed(versions) if "full" in read_stable(directory, v)["manifests"]), None)


def remove(directory: Path, version: int) -> None:
    """STABLE first: without it the version does not exist for a reader."""
    path = directory / version_name(version)
    (path / STABLE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
