"""What this machine has, as one plain JSON document: system, Python, packages, GPUs.

`probe()` asks the operating system, package metadata and `nvidia-smi`; it never imports torch. Everything that decides
something (backend, plan, doctor) works on the document, so a document recorded elsewhere is as good as this machine.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from astracli.errors import UserError
from astracli.machine import read as machine_read

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "huggingface-hub": "huggingface_hub",
    "numpy": "numpy",
    "math-verify": "math_verify",
    "typer": "typer",
    "pydantic": "pydantic",
    "sglang": "sglang",
    "flashinfer-python": "flashinfer",
    "flashinfer": "flashinfer",
    "flash-attn": "flash_attn",
    "flash-linear-attention": "fla",
    "causal-conv1d": "causal_conv1d",
    "triton": "triton",
    "tilelang": "tilelang",
    "apache-tvm-ffi": "tvm_ffi",
    "sglang-kernel": "sgl_kernel",
}
"""Distribution -> the module that it installs."""

RECORDED = "recorded by machine.probe"

MODEL_FILES = {"transformers": "models", "sglang": "srt/models"}
"""Package -> the folder in it that holds one entry a model family."""

ENVIRONMENT = (
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "ASTRA_DATA_DIR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_P2P_DISABLE",
    "PYTHONPATH",
)


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


class Pin(_Part):
    wants: str
    """Exact version that the package asks for."""
    has: str | None
    """Version installed beside it; None = not there."""


class Package(_Part):
    version: str | None
    """From the package's metadata; None = not installed under its name."""
    module: str
    importable_spec: bool
    """An import system finder knows the module. Not enough by itself: a namespace stub passes."""
    origin: str | None
    """File that the import would run; None = there is none, so nothing can be imported from it."""
    models: list[str] | None = None
    """Model types of the installed adapters that the package has a file for; None = not looked at."""
    compiled: list[str] | None = None
    """Compiled kernels that are looked for in it (`machine_read.COMPILED`) and are there; None = not looked at."""
    pins: dict[str, Pin] = {}
    """Its exact requirements (`name==version`), without extras."""


class GpuProcess(_Part):
    pid: int
    name: str
    memory: int | None
    """Bytes of GPU memory."""


class Gpu(_Part):
    index: int
    uuid: str
    name: str
    compute_capability: str
    memory_total: int | None
    memory_free: int | None
    driver: str
    processes: list[GpuProcess] = []
    """Those that nvidia-smi sees: in a container often none, although memory is taken."""


class Compilers(_Part):
    cc: str | None
    nvcc: str | None
    cccl: str | None = None
    """Folder of the CUDA C++ core headers (`cuda/std`) that belongs to nvcc."""


class Environment(_Part):
    """The engine's own interpreter, when a recipe names one in resources.engine.python."""

    executable: str
    error: str | None = None
    """Why it gave no answer."""
    version: str | None = None
    libc: str | None = None
    packages: dict[str, Package] = {}
    torch_cuda: str | None = None


class Tensor(_Part):
    dtype: str
    """As safetensors writes it: `BF16`, `F32`."""
    shape: list[int]


class CheckpointFacts(_Part):
    path: str
    """model.path of the recipe that was asked for."""
    place: str | None
    """Directory on this machine; None = not here."""
    problem: str | None = None
    """Why the path, config.json or a file header cannot be read."""
    config: dict[str, Any] | None = None
    missing_files: list[str] = []
    """Shards that the index names and the directory lacks."""
    tensors: dict[str, Tensor] = {}
    tokenizer: list[str] = []
    """Tokenizer files that are there."""
    chat_template: bool = False


class DataSet(_Part):
    name: str
    use: Literal["train", "eval"]
    hub_id: str | None
    """None = generated or a local file."""
    place: str | None
    """File or directory on this machine, `generated`, or None = not here."""
    problem: str | None = None


class Network(_Part):
    hosts: dict[str, str | None]
    """Address that a run listens on -> why it cannot be bound; None = it can."""
    ports: list[int] | None
    """First and last port that the system gives out."""
    hub: str
    hub_error: str | None = None
    """Why the Hub cannot be reached."""
    hub_asked: bool = False
    """False = not tried: nothing needs it, or HF_HUB_OFFLINE is set."""


class RunLeft(_Part):
    """A run whose supervisor is gone although it never ended."""

    path: str
    step: int
    bytes: int
    """Of weights and staged payloads that only a running run needs."""
    processes: dict[str, str] = {}
    """Processes of it that still run: id -> module."""


class Machine(_Part):
    schema_version: Literal[1] = 1
    source: str = RECORDED
    """Where the document comes from."""
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
    engine: Environment | None = None
    checkpoint: CheckpointFacts | None = None
    data: list[DataSet] = []
    network: Network | None = None
    runs: list[RunLeft] = []


def schema() -> dict[str, Any]:
    """JSON schema of the document."""
    return Machine.model_json_schema()


def validate(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with every optional key filled in. Raises UserError naming the first key that is wrong."""
    try:
        return Machine.model_validate(document).model_dump(mode="json")
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
        "compilers": machine_read.compilers(),
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
