"""Write the machine documents that ship with astra: `python scripts/make_machines.py`; with --check say which are old.

    astracli/assets/machines/NAME.json      for `--facts NAME` of `astra train --dry-run` and `astra doctor`

They are typical machines, none of them measured: GPUs as nvidia-smi shows them, hosts as such machines are usually
sold. A document has to name packages, or nothing could be judged on it: those are what constraints/ installs. It says
nothing of checkpoints, data and network.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astracli.machine.facts import validate
from astracli.machine.packages import PACKAGES
from astracli.machine.read import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "astracli" / "assets" / "machines"
GIB, MIB = 2**30, 2**20
DRIVER = "580.105.08"
"""The branch that CUDA 13.0 needs."""
CUDA = "13.0"
"""What torch of constraints/cuda.txt is built for."""

GPUS: dict[str, tuple[str, str, int]] = {
    "l40": ("NVIDIA L40", "8.9", 45056),
    "l40s": ("NVIDIA L40S", "8.9", 46068),
    "4090": ("NVIDIA GeForce RTX 4090", "8.9", 24564),
    "a10g": ("NVIDIA A10G", "8.6", 23028),
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 81920),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 81559),
    "h200": ("NVIDIA H200", "9.0", 143771),
    "b200": ("NVIDIA B200", "10.0", 183359),
    "5090": ("NVIDIA GeForce RTX 5090", "12.0", 32607),
}
"""(name, compute capability, MiB as nvidia-smi shows them; of an L40 the 44 GiB that AstraFlow 0.1.2 gives for it)"""

NVLINKED = ("a100", "h100", "h200", "b200")
"""Servers with these have NVLink between all of them."""


@dataclass(frozen=True)
class Host:
    what: str
    cores: int
    memory_gib: int
    disk_gib: int
    limits: dict[str, int] = field(default_factory=dict)
    """Where they differ from a server's: nofile, nofile_hard, memlock, shm_total."""
    busy_gib: float = 0.3
    """Of each GPU: driver, and a desktop where there is one."""


RENTED = {"nofile": 65536, "memlock": 8 * MIB}
DESKTOP = {"nofile": 1024, "nofile_hard": 524288, "memlock": 2 * GIB}
DOCKER = {"nofile": 1024, "nofile_hard": 1024, "memlock": 65536, "shm_total": 64 * MIB}

MACHINES: dict[str, tuple[int, str, Host]] = {
    "laptop": (0, "", Host("a laptop", 16, 16, 120, DESKTOP)),
    "rtx5090": (1, "5090", Host("a workstation", 32, 128, 900, DESKTOP, 1.4)),
    "1x4090": (1, "4090", Host("a rented machine", 16, 96, 400, RENTED)),
    "1xl40s": (1, "l40s", Host("a rented machine", 16, 128, 500, RENTED)),
    "1xl40": (1, "l40", Host("a rented machine", 16, 128, 500, RENTED)),
    "1xa100-80g": (1, "a100", Host("a rented machine", 24, 216, 500, RENTED)),
    "1xh200": (1, "h200", Host("a rented machine", 16, 192, 500, RENTED)),
    "2xh200": (2, "h200", Host("a rented machine", 32, 384, 1000, RENTED)),
    "4xa10g": (4, "a10g", Host("a rented machine", 48, 192, 600, RENTED)),
    "8xl40": (8, "l40", Host("a server", 128, 1024, 2000)),
    "8xa100-80g": (8, "a100", Host("a server", 128, 1024, 4000)),
    "8xh100": (8, "h100", Host("a server", 224, 2048, 6000)),
    "8xh200": (8, "h200", Host("a server", 224, 2048, 6000)),
    "8xb200": (8, "b200", Host("a server", 224, 2048, 8000)),
    "container": (8, "h100", Host("a container with Docker's default limits on a server", 64, 512, 800, DOCKER)),
}
"""Name -> (count, key of GPUS, host)"""


def packages(file: str) -> dict[str, Any]:
    """Those of a file of constraints/ that astra asks a machine for, as installed."""
    found = {}
    for line in (ROOT / "constraints" / file).read_text().splitlines():
        name, _, version = re.sub(r"_", "-", line.lower()).partition("==")
        if module := PACKAGES.get(name):
            found[name] = {"version": version, "module": module, "importable_spec": True}
            found[name]["origin"] = f"/venv/lib/python3.12/site-packages/{module}/__init__.py"
    return found


def document(name: str) -> dict[str, Any]:
    """One machine document, whole. Raises when it does not fit `machine.Machine`."""
    count, kind, host = MACHINES[name]
    file = "cuda.txt" if count else "cpu.txt"
    product, capability, mib = GPUS.get(kind, ("", "", 0))
    gpus = f"{count} x {product}" if count else "no GPU"
    limits = {"shm_total": host.memory_gib * GIB // 2, "nofile": 1048576, "nofile_hard": 1048576, "memlock": -1}
    total = host.memory_gib * GIB
    gpu = {
        "name": product,
        "compute_capability": capability,
        "memory_total": mib * MIB,
        "memory_free": mib * MIB - int(host.busy_gib * GIB),
        "driver": DRIVER,
    }
    installed = packages(file)
    if not count:
        installed["torch"]["version"] += "+cpu"
        installed.pop("triton")
    return validate(
        {
            "source": f"typical, not measured: {host.what}, {gpus}; the packages are those of constraints/{file}",
            "system": {
                "os": "Linux",
                "kernel": "6.8.0",
                "libc": "glibc 2.35",
                "arch": "x86_64",
                "cpu": f"{host.cores} cores",
                "cores": host.cores,
                "cores_usable": float(host.cores),
                "memory_total": total,
                "memory_available": int(total * (0.95 if count else 0.65)),
                "disk_path": "/data" if count else "/home",
                "disk_free": host.disk_gib * GIB,
                **(limits | host.limits),
            },
            "python": {"version": "3.12.3", "executable": "/venv/bin/python", "venv": True},
            "packages": installed,
            "torch_cuda": CUDA if count else None,
            "gpus": [{"index": i, "uuid": f"GPU-{i:08d}", **gpu} for i in range(count)],
            "gpu_error": None,
            "peer_link": (("NVLink" if kind in NVLINKED else "PCIe") if count > 1 else None),
            "compilers": {"cc": "/usr/bin/cc", "nvcc": None},
            "env": dict.fromkeys(ENVIRONMENT),
        }
    ).document()


def main() -> int:
    wanted = {f"{name}.json": json.dumps(document(name), indent=1) + "\n" for name in MACHINES}
    old = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    if sys.argv[1:] == ["--check"]:
        wrong = sorted(name for name in wanted.keys() | old.keys() if wanted.get(name) != old.get(name))
        if wrong:
            print(f"out of date: {', '.join(wrong)}; run `python scripts/make_machines.py`", file=sys.stderr)
        return 1 if wrong else 0
    for name in old.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
