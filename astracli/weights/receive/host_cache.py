"""Published versions on a host with several engines: each file is fetched once, checked, and served to all of them.

The folder has the publisher's layout. An engine's own receiver links a large file from it, as from a publisher's disk.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from astracli.process.atomic import write_atomic
from astracli.weights import WeightCorrupt
from astracli.weights.format.manifest import NONCE, STABLE, hash_file, unseal, version_name
from astracli.weights.receive.download import Downloader, Gone

RETRIES = 8
TRIES = 2
"""Downloads of a file that arrives corrupt."""


class HostCache:
    """Thread-safe. Raises RunFailed when the publisher is not reached, WeightCorrupt for a file that stays corrupt."""

    def __init__(self, url: str, token: str, directory: Path, *, link_bytes: int | None = 8 << 20):
        """`link_bytes`: larger files are linked where publisher and host share a disk; None: none is."""
        self._source = Downloader(url, token, RETRIES, link_bytes=link_bytes)
        self._directory = directory.resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._nonce = secrets.token_hex(16)
        write_atomic(self._directory / NONCE, self._nonce.encode())
        self._lock = threading.Lock()
        self._files: defaultdict[tuple[int, str], threading.Lock] = defaultdict(threading.Lock)

    @property
    def downloaded(self) -> int:
        """Bytes that came over the network."""
        return self._source.downloaded

    def listing(self) -> dict[str, Any]:
        """The publisher's, with this folder as the place from which files may be linked. What the publisher has no more
        is deleted."""
        detail = self._source.listing()
        keep = {version_name(version) for version in detail}
        for old in self._directory.glob("v*"):
            if old.name not in keep:
                shutil.rmtree(old, ignore_errors=True)
        with self._lock:
            for version, name in [key for key in self._files if key[0] not in detail]:
                self._files.pop((version, name), None)
        store = {"directory": str(self._directory), "nonce": self._nonce}
        versions = sorted(detail)
        shown = {str(version): kinds for version, kinds in detail.items()}
        return {"versions": versions, "latest": max(versions, default=None), "detail": shown, "store": store}

    def file(self, version: int, name: str) -> Path | None:
        """A file of a version, fetched when it is not here; None when the publisher has none of that name."""
        with self._lock:
            one = self._files[version, name]
        with one, contextlib.suppress(Gone):
            return self._file(version, name)
        return None

    def _file(self, version: int, name: str) -> Path | None:
        folder = self._directory / version_name(version)
        stable, path = self._stable(version, folder), folder / name
        if name == STABLE:
            return path
        if name not in stable["files"]:
            return None
        hashes = _hashes(stable, folder, name)
        if path.exists():
            return path  # it was checked when it came
        fresh = path.with_name(f".{name}")
        for attempt in range(1, TRIES + 1):
            size = int(stable["files"][name])
            if attempt > 1 or not self._source.link(version, name, size, fresh):
                self._source.fetch(version, name, size, fresh)
            if not hashes or hash_file(fresh) in hashes:
                fresh.replace(path)
                return path
            fresh.unlink()
        raise WeightCorrupt(f"`{name}` of version {version} arrived corrupt {TRIES} times")

    def _stable(self, version: int, folder: Path) -> dict[str, Any]:
        """What the publisher says of a version now: a payload may be pruned while the version stays."""
        blob = self._source.get(self._source.address(version, STABLE)).content
        stable = unseal(blob, f"STABLE of version {version}")
        folder.mkdir(exist_ok=True)
        write_atomic(folder / STABLE, blob)
        return stable

    def close(self) -> None:
        self._source.close()


def _hashes(stable: dict[str, Any], folder: Path, name: str) -> set[str]:
    """What the digest of a file may be: of a manifest by STABLE, of a payload by the manifests that are here."""
    kinds = stable["manifests"].values()
    if any(kind["file"] == name for kind in kinds):
        return {kind["xxh3"] for kind in kinds}
    found = set()
    for kind in kinds:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(json.loads((folder / kind["file"]).read_bytes())["files"][name]["xxh3"])
    return found
