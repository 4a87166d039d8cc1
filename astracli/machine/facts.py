"""The facts of a machine as frozen, typed objects: system, Python, packages, GPUs, and what a recipe needs of it.

Backends, plan and doctor decide by a `Machine` alone. It may be this machine (`read.py`) or one that was recorded
elsewhere as a JSON document (`documents.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from astracli.errors import UserError

Capability = tuple[int, int]
"""Compute capability: (8, 9)."""
PeerLink = Literal["NVLink", "PCIe"]
"""How GPUs reach each other."""
OLDEST: Capability = (8, 0)
"""bf16 arithmetic begins here."""
RECORDED = "recorded by machine.probe"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """Whether Python's import system finds the module. An empty folder is found too: see `usable`."""
    origin: str | None
    """The file that an import would run; None = there is no such file, so the module is empty."""
    models: tuple[str, ...] | None = None
    """Which of the adapters' model types the package has code for; None = not checked."""
    compiled: tuple[str, ...] | None = None
    """Which of the compiled kernels in `packages.COMPILED` it has; None = not checked."""
    pins: dict[str, Pin] = {}
    """Its exact requirements (`name==version`), without extras."""

    @property
    def usable(self) -> bool:
        """Whether it can really be imported: there is a file to run."""
        return self.importable_spec and self.origin is not None


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
    """Bytes that may be used."""
    memory_free: int | None
    driver: str
    processes: tuple[GpuProcess, ...] = ()
    """As nvidia-smi lists them. In a container it often lists none although memory is in use."""
    memory_card: int | None = None
    """Bytes that the card has, where `memory_total` is less (`Machine.limited`)."""

    @property
    def capability(self) -> Capability:
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor or 0)


class Compilers(_Part):
    cc: str | None
    nvcc: str | None
    cccl: str | None = None
    """Folder of the CUDA C++ core headers (`cuda/std`) of this nvcc."""


class Environment(_Part):
    """The engine's own interpreter, when a recipe names one in resources.engine.python."""

    executable: str
    error: str | None = None
    """Why its packages could not be listed."""
    version: str | None = None
    libc: str | None = None
    packages: dict[str, Package] = {}
    torch_cuda: str | None = None


class Tensor(_Part):
    dtype: str
    """As safetensors writes it: `BF16`, `F32`."""
    shape: tuple[int, ...]


class CheckpointFacts(_Part):
    path: str
    """The recipe's model.path."""
    place: str | None
    """Directory on this machine; None = not here."""
    problem: str | None = None
    """Why the path, config.json or a file header cannot be read."""
    config: dict[str, Any] | None = None
    missing_files: tuple[str, ...] = ()
    """Shards that the index lists and the directory does not have."""
    tensors: dict[str, Tensor] = {}
    tokenizer: tuple[str, ...] = ()
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
    ports: tuple[int, int] | None
    """First and last port that the system assigns by itself."""
    hub: str
    hub_error: str | None = None
    """Why the Hub cannot be reached."""
    hub_asked: bool = False
    """Whether the Hub was contacted; False when nothing needs it or HF_HUB_OFFLINE is set."""


class RunLeft(_Part):
    """A run that did not end, but whose supervisor is gone."""

    path: str
    step: int
    bytes: int
    """Size of the weights and staged payloads that only a live run needs."""
    processes: dict[str, str] = {}
    """Its processes that are still alive: process id -> module."""


class Machine(_Part):
    schema_version: Literal[1] = 1
    source: str = RECORDED
    """Where the document comes from."""
    system: System
    python: Python
    packages: dict[str, Package]
    torch_cuda: str | None
    """CUDA version that torch was built for; None for a CPU build or without torch."""
    gpus: tuple[Gpu, ...]
    gpu_error: str | None
    """Why `nvidia-smi` gave no answer although it is there."""
    peer_link: PeerLink | None = None
    """The slowest way between two GPUs, as `nvidia-smi topo -m` shows it; None = fewer than two, or not known."""
    compilers: Compilers
    env: dict[str, str | None]
    engine: Environment | None = None
    checkpoint: CheckpointFacts | None = None
    data: tuple[DataSet, ...] = ()
    network: Network | None = None
    runs: tuple[RunLeft, ...] = ()

    def document(self) -> dict[str, Any]:
        """As plain JSON, whole."""
        return self.model_dump(mode="json")

    def package(self, name: str) -> Package:
        """A package of the document; one that is not in it counts as not installed."""
        return self.packages.get(name) or Package(version=None, module=name, importable_spec=False, origin=None)

    def usable(self, name: str) -> bool:
        return self.package(name).usable

    def version_of(self, name: str) -> tuple[int, ...]:
        """(2, 13, 0) of an importable package; () when it is not there."""
        found = self.package(name)
        return version_tuple(found.version) if found.version and found.usable else ()

    @property
    def visible_gpus(self) -> list[Gpu]:
        """The GPUs that CUDA_VISIBLE_DEVICES selects, in its order. Its entries are indexes or prefixes of a uuid."""
        chosen = self.env.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return list(self.gpus)
        result = []
        for entry in (part.strip() for part in chosen.split(",")):
            named = (
                g for g in self.gpus if str(g.index) == entry or (not entry.isdigit() and g.uuid.startswith(entry))
            )
            if not entry or (gpu := next(named, None)) is None:
                break  # as CUDA does: the first entry that names nothing ends the list
            result.append(gpu)
        return result

    def limited(self, gpu_gib: float | None) -> Machine:
        """This machine when at most `gpu_gib` GiB of each GPU may be used."""
        if gpu_gib is None:
            return self
        most = int(gpu_gib * 2**30)
        gpus = tuple(
            gpu.model_copy(update={"memory_total": most, "memory_card": gpu.memory_total})
            if gpu.memory_total is not None and gpu.memory_total > most
            else gpu
            for gpu in self.gpus
        )
        return self.model_copy(update={"gpus": gpus})

    @property
    def gpu_share(self) -> float:
        """Of the memory of each visible card, what may be used; the least of them."""
        shares = [g.memory_total / g.memory_card for g in self.visible_gpus if g.memory_total and g.memory_card]
        return min(shares, default=1.0)

    @property
    def gpu_sizes(self) -> dict[int, int]:
        """Index -> bytes of memory, of the visible GPUs whose size is known."""
        return {gpu.index: gpu.memory_total for gpu in self.visible_gpus if gpu.memory_total}

    @property
    def capability(self) -> Capability | None:
        """The lowest compute capability among the visible GPUs; None without a GPU."""
        return min((gpu.capability for gpu in self.visible_gpus), default=None)

    def as_engine(self, foreign: bool) -> Machine | None:
        """This machine with the packages of the engine's interpreter; None when they are not known. `foreign`: the
        engine has an interpreter of its own."""
        if not foreign:
            return self
        if self.engine is None or self.engine.error is not None:
            return None
        return self.model_copy(update={"packages": self.engine.packages, "torch_cuda": self.engine.torch_cuda})


def validate(document: Mapping[str, Any]) -> Machine:
    """The machine of a document. Raises UserError naming the first key that is wrong."""
    try:
        return Machine.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"not a machine description: `{where}`: {first['msg'].lower()}") from None


def version_tuple(text: str) -> tuple[int, ...]:
    """`2.13.0+cu130` -> (2, 13, 0): the leading numbers of a version."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
