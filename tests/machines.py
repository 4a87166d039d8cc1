"""Recorded machine facts for tests: one document a kind of machine, cut to what decisions read."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def package(version: str | None, *, stub: bool = False) -> dict[str, Any]:
    there = version is not None and not stub
    return {
        "version": version,
        "module": "m",
        "importable_spec": there or stub,
        "origin": "/site/m/__init__.py" if there else None,
    }


def facts(
    capability: str | None = None,
    gpus: int = 0,
    *,
    memory_gib: float = 48,
    packages: dict[str, str | None] | None = None,
    stubs: tuple[str, ...] = (),
    visible: str | None = None,
    host_gib: float = 24,
    disk_gib: float = 500,
    nvcc: str | None = None,
) -> dict[str, Any]:
    """A machine with `gpus` GPUs of one compute capability and the given package versions over a usual set."""
    versions: dict[str, str | None] = {"torch": "2.13.0", "transformers": "5.12.1", "numpy": "2.4.6"}
    versions |= {"safetensors": "0.8.0", "datasets": "5.2.0", "math-verify": "0.9.0", "typer": "0.20.0"}
    versions |= {"pydantic": "2.12.0"}
    if capability is not None:
        versions |= {"sglang": "0.5.21", "flashinfer-python": "0.6.18", "triton": "3.7.1"}
        versions |= {"flash-linear-attention": "0.6.0"}
    versions |= packages or {}
    absent = ("flash-attn", "sglang", "flashinfer-python", "triton", "flash-linear-attention", "tilelang")
    table = {name: package(None) for name in absent} | {name: package(v) for name, v in versions.items()}
    table |= {name: package(None, stub=True) for name in stubs}
    return {
        "schema_version": 1,
        "system": {
            "os": "Linux",
            "kernel": "6.8",
            "libc": "glibc 2.36",
            "arch": "x86_64",
            "cpu": "a cpu",
            "cores": 2 if not gpus else 64,
            "cores_usable": 2.0 if not gpus else 64.0,
            "memory_total": int(host_gib * GIB),
            "memory_available": int(host_gib * GIB * 0.9),
            "shm_total": 8 * GIB,
            "nofile": 65536,
            "nofile_hard": 65536,
            "memlock": -1,
            "disk_path": "/work",
            "disk_free": int(disk_gib * GIB),
        },
        "python": {"version": "3.12.3", "executable": "/venv/bin/python", "venv": True},
        "packages": table,
        "torch_cuda": "13.0" if capability else None,
        "gpus": [
            {
                "index": i,
                "uuid": f"GPU-{i}",
                "name": "a gpu",
                "compute_capability": capability,
                "memory_total": int(memory_gib * GIB),
                "memory_free": int(memory_gib * GIB),
                "driver": "580.105.08",
            }
            for i in range(gpus)
        ],
        "gpu_error": None,
        "compilers": {"cc": "/usr/bin/cc", "nvcc": nvcc},
        "env": {"CUDA_VISIBLE_DEVICES": visible, "HF_HOME": None, "HF_HUB_OFFLINE": None},
    }
