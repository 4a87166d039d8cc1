"""Choices that Triton has tuned (tile sizes, warps, stages), as documents that travel from one machine to another.

Triton tries every configuration of a kernel for each new shape, and fla lets it keep the times in Triton's cache, one
file for a kernel and shape. Such a file stands under a key made from the versions of Triton and of the compiler, the
GPU's architecture, the kernel's source and all its configurations. So a file that does not fit is never found, and the
kernel is tuned as if there were none. Documents hold the quickest configuration alone; compiling it is all that is left
to do. Those in `assets/tuned` are for every machine whose GPU and versions they name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from astracli.process.atomic import write_atomic

FOLDER = Path(__file__).parents[2] / "assets" / "tuned"
"""Documents that ship with the package."""
FORMAT = 1
_KEY = re.compile(r"[A-Z2-7]{40,64}")
_FILE = re.compile(r"\w{1,150}\.autotune\.json")


@dataclass(frozen=True)
class Origin:
    """Where choices were tuned, or may be used."""

    capability: str
    """Of the GPU, such as `9.0`; Triton's key asks for no more of it."""
    triton: str
    fla: str


@dataclass(frozen=True)
class Installed:
    files: int = 0
    """Written; those that were there already are left."""
    refused: tuple[str, ...] = ()
    """Of each document that was made elsewhere, why it is not used."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    return Path(environment.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))


def here() -> Origin | None:
    """This process's GPU and packages; None without a GPU or one of the packages."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        found = version("triton"), version("flash-linear-attention")
    except PackageNotFoundError:
        return None
    return Origin(".".join(map(str, torch.cuda.get_device_capability())), *found)


def collect(cache: Path) -> dict[str, Any]:
    """{`KEY/kernel.autotune.json`: the file with its quickest configuration alone} of a Triton cache."""
    found = {}
    for file in sorted(cache.glob("*/*.autotune.json")):
        name = f"{file.parent.name}/{file.name}"
        try:
            chosen = _quickest(json.loads(file.read_bytes()))
        except (OSError, ValueError):
            continue  # half a file, or another form: Triton tunes that kernel again
        if chosen is not None and _safe(name):
            found[name] = chosen
    return found


def document(cache: Path, origin: Origin, gpu: str, load: str) -> dict[str, Any]:
    """What a Triton cache holds of tuned choices. `gpu`: its name; `load`: what was computed. Both are for readers."""
    return {"format": FORMAT, "gpu": gpu, "load": load, **asdict(origin), "files": collect(cache)}


def shipped() -> list[dict[str, Any]]:
    return [json.loads(file.read_bytes()) for file in sorted(FOLDER.glob("*.json"))]


def install(documents: Iterable[Mapping[str, Any]], cache: Path, origin: Origin | None) -> Installed:
    """Put the choices of documents that were made on such a machine into a Triton cache. Raises OSError."""
    files, refused = 0, []
    for doc in documents:
        if (why := _refused(doc, origin)) is not None:
            refused.append(f"{doc.get('gpu')}, {doc.get('load')}: {why}")
            continue
        for name, content in doc["files"].items():
            if not _safe(name) or _quickest(content) is None:
                raise ValueError(f"a document of tuned choices names `{name[:200]}`, which is no file of them")
            if not (cache / name).exists():
                write_atomic(cache / name, json.dumps(content))
                files += 1
    return Installed(files, tuple(refused))


def _refused(doc: Mapping[str, Any], origin: Origin | None) -> str | None:
    """Why a document is of no use here; None when it is."""
    if doc.get("format") != FORMAT:
        return f"format {doc.get('format')}, this version reads {FORMAT}"
    if origin is None:
        return "there is no GPU with Triton and fla here"
    for name, ours in asdict(origin).items():
        if doc.get(name) != ours:
            what = "compute capability" if name == "capability" else name
            return f"tuned for {what} {doc.get(name)}, here it is {ours}"
    return None


def _safe(name: str) -> bool:
    folder, _, file = name.partition("/")
    return _KEY.fullmatch(folder) is not None and _FILE.fullmatch(file) is not None


def _quickest(content: Any) -> dict[str, Any] | None:
    """Triton's file with one configuration; None for something else. A time is a number, or those of several runs."""
    times: Any = content.get("configs_timings") if isinstance(content, dict) else None
    if not isinstance(times, list) or not times:
        return None
    if not all(isinstance(time, list) and len(time) == 2 and isinstance(time[0], dict) for time in times):
        return None
    return {"key": content.get("key"), "configs_timings": [min(times, key=lambda time: time[1])]}
