"""What processes of other hosts read before they start, the model and files of problems: offered, and found or fetched.

A host that has the same bytes at the same path uses them there. Any other fetches them once, into a cache under the
digest of their content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from astracli.errors import RunFailed
from astracli.launch.inputs import Inputs
from astracli.weights.format.manifest import hash_file

OF_A_MODEL = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of the files of a checkpoint that engines, tokenizers and adapters read."""


class HostInputs:
    """On the first host: the files, by path, and each under a name that an agent asks for."""

    def __init__(self, inputs: Inputs):
        self._models = [inputs.model, *filter(None, [inputs.teacher])]
        self._data = list(filter(None, inputs.data.values()))

    @cached_property
    def document(self) -> dict[str, list[dict[str, Any]]]:
        """Path -> its files: `file` below it ("" of the path itself), `bytes`, `xxh3`."""
        of_models = {str(path): [_described(path, file) for file in _files(path, OF_A_MODEL)] for path in self._models}
        return of_models | {str(path): [_described(path, file) for file in _files(path)] for path in self._data}

    def file(self, name: str) -> Path | None:
        """The file that is asked for as `digest`; None for any other."""
        for path, files in self.document.items():
            for one in files:
                if one["xxh3"] == name:
                    return Path(path) / one["file"]
        return None


def _files(path: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """A file itself, or those in a folder that end so."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(suffixes))


def _described(path: Path, file: Path) -> dict[str, Any]:
    name = "" if file == path else file.name
    return {"file": name, "bytes": file.stat().st_size, "xxh3": hash_file(file)}


Fetch = Callable[[str, int, Path], None]
"""(digest, bytes, where it is put)"""


def found(path: str, files: list[Mapping[str, Any]], cache: Path, fetch: Fetch) -> Path:
    """Where a path of the first host is on this one. Raises RunFailed when it is not, and cannot be fetched."""
    here = Path(path)
    if all(_same(here / one["file"], one) for one in files):
        return here
    if not files:
        raise RunFailed(
            f"`{path}` is not on this host, and is no file that can be sent", "put it at the same path on every host"
        )
    key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:24]
    place = cache / key
    place.mkdir(parents=True, exist_ok=True)
    for one in files:
        name = one["file"] or here.name
        if "/" in name or name in ("", ".", ".."):
            raise RunFailed(f"`{name}` is no name of a file")
        target = place / name
        if not _same(target, one):
            part = target.with_name(f".{name}.{os.getpid()}")
            try:
                fetch(one["xxh3"], one["bytes"], part)
                if not _same(part, one):
                    raise RunFailed(f"`{name}` came damaged from the first host", "start the agent again")
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
    return place if files[0]["file"] else place / here.name


def _same(file: Path, one: Mapping[str, Any]) -> bool:
    try:
        return file.stat().st_size == one["bytes"] and hash_file(file) == one["xxh3"]
    except OSError:
        return False
