"""What this machine has, as one plain JSON document: system, Python, packages, GPUs.

`probe()` asks the operating system, package metadata and `nvidia-smi`; it never imports torch. Everything that decides
something (backend, plan, doctor) works on the document, so a document recorded elsewhere is as good as this machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from astracli import machine_read
from astracli.errors import UserError

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "math-verify": "math_verify",
    "typer": "typer",
    "pydantic": "pydantic",
    "sglang": "sglang",
    "flashinfer-python": "flashinfer",
    "flash-attn": "flash_attn",
    "flash-linear-attention": "fla",
    "causal-conv1d": "causal_conv1d",
    "triton": "triton",
    "tilelang": "tilelang",
}
"""Distribution -> the module that it installs."""

ENVIRONMENT = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class System(_Part):
    """Sizes in bytes; None = not known on this operating system."""

    os: str
    kernel: str
    libc: str | None
    arch: str
    cpu: str
    cores: int
    cores_usable: float
    """After affinity and cgroup quota: what this process may really use."""
    memory_total: int
    """The cgroup's limit where it is lower than the machine's."""
    memory_available: int
    shm_total: int | None
    """Size of /dev/shm."""
    nofile: int
    """Soft limit of open files; -1 = unlimited."""
    nofile_hard: int
    memlock: int
    """Soft limit of locked memory, bytes; -1 = unlimited."""
    disk_path: str
    disk_free: int


class Python(_Part):
    version: str
    executable: str
    venv: bool


class Package(_Part):
    version: str | None
    """From the package's metadata; None = not installed under its name."""
    module: str
    importable_spec: bool
    """An import system finder knows the module. Not enough by itself: a namespace stub passes."""
    origin: str | None
    """File that the import would run; None = there is none, so nothing can be imported from it."""


class Gpu(_Part):
    index: int
    uuid: str
    name: str
    compute_capability: str
    memory_total: int | None
    memory_free: int | None
    driver: str


class Compilers(_Part):
    cc: str | None
    nvcc: str | None


class Machine(_Part):
    schema_version: Literal[1] = 1
    system: System
    python: Python
    packages: dict[str, Package]
    torch_cuda: str | None
    """CUDA version that torch was built for; None for a CPU build or without torch."""
    gpus: list[Gpu]
    gpu_error: str | None
    """Why `nvidia-smi` gave no answer although it is there."""
    compilers: Compilers
    env: dict[str, str | None]


def schema() -> dict[str, Any]:
    """JSON schema of the document."""
    return Machine.model_json_schema()


def validate(document: Mapping[str, Any]) -> None:
    """Raise UserError naming the first key of a document that is not a machine description."""
    try:
        Machine.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"not a machine description: `{where}`: {first['msg'].lower()}") from None


def probe() -> dict[str, Any]:
    """The document for this machine; well under half a second unless `nvidia-smi` is slow."""
    gpus, gpu_error = machine_read.gpus()
    document = {
        "schema_version": 1,
        "system": machine_read.system(),
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "venv": sys.prefix != sys.base_prefix,
        },
        "packages": {name: machine_read.package(name, module) for name, module in PACKAGES.items()},
        "torch_cuda": machine_read.torch_cuda(),
        "gpus": gpus,
        "gpu_error": gpu_error,
        "compilers": {"cc": shutil.which("cc") or shutil.which("gcc"), "nvcc": shutil.which("nvcc")},
        "env": {name: os.environ.get(name) for name in ENVIRONMENT},
    }
    return Machine.model_validate(document).model_dump(mode="json")


def usable(facts: Mapping[str, Any], package: str) -> bool:
    """The package can really be imported: it has a file to run, not only a namespace folder."""
    found = facts["packages"].get(package)
    return bool(found and found["importable_spec"] and found["origin"])


def version_of(facts: Mapping[str, Any], package: str) -> tuple[int, ...]:
    """(2, 13, 0) of an importable package; () when it is not there."""
    text = facts["packages"].get(package, {}).get("version")
    return version_tuple(text) if text and usable(facts, package) else ()


def version_tuple(text: str) -> tuple[int, ...]:
    """`2.13.0+cu130` -> (2, 13, 0): the leading numbers of a version."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def visible_gpus(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; entries are indexes or uuid prefixes."""
    gpus = list(facts["gpus"])
    chosen = facts["env"].get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    result = []
    for entry in (part.strip() for part in chosen.split(",")):
        match = [g for g in gpus if (str(g["index"]) == entry or (not entry.isdigit() and g["uuid"].startswith(entry)))]
        if not entry or not match:
            break  # as CUDA does: the first entry that names nothing ends the list
        result.append(match[0])
    return result
