"""Readers behind `machine.probe`: the operating system, package metadata, cgroups and nvidia-smi, as plain values."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

GPU_QUERY = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
_CGROUP = Path("/sys/fs/cgroup")
COMPILED = {"sgl_kernel": ("flash_ops",)}
"""Module -> shared libraries that a build of it may lack. flash_ops: FlashAttention-3, for Hopper."""


def package(name: str, module: str) -> dict[str, Any]:
    """Version from metadata, and where the module would come from; the module is found, never imported."""
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    origin = spec.origin if spec is not None and spec.origin and os.path.isfile(spec.origin) else None
    found: dict[str, Any] = {"version": version, "module": module, "importable_spec": spec is not None}
    if module in COMPILED and origin is not None:
        folder = Path(origin).parent
        found["compiled"] = [name for name in COMPILED[module] if any(folder.glob(f"**/{name}*.so"))]
    return found | {"origin": origin}


def exact_pins(name: str) -> dict[str, dict[str, str | None]]:
    """The `other==version` requirements of a distribution, extras left out, and what is installed of each."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^]]*\])?\s*\(?==\s*([^\s;,)]+)", line)
        if match is None or "extra" in line.partition(";")[2]:
            continue
        try:
            has: str | None = metadata.version(match.group(1))
        except metadata.PackageNotFoundError:
            has = None
        found[match.group(1)] = {"wants": match.group(3), "has": has}
    return found


def model_files(module: str, folder: str, names: list[str]) -> list[str] | None:
    """Those of `names` that a package has `folder/NAME` or `folder/NAME.py` for; None without the package."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        return None
    place = Path(spec.origin).parent / folder
    return [name for name in names if (place / name).is_dir() or (place / f"{name}.py").is_file()]


def compilers() -> dict[str, str | None]:
    """C compiler, nvcc, and the CUDA C++ core headers of that nvcc."""
    nvcc = shutil.which("nvcc")
    home = Path(os.path.realpath(nvcc)).parents[1] if nvcc else None
    places = [home / part for part in ("include", "include/cccl", "targets/x86_64-linux/include/cccl")] if home else []
    cccl = next((str(place) for place in places if (place / "cuda" / "std").is_dir()), None)
    return {"cc": shutil.which("cc") or shutil.which("gcc"), "nvcc": nvcc, "cccl": cccl}


def torch_cuda() -> str | None:
    """CUDA version that torch was built for, from torch/version.py read as text."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def gpus(timeout_s: float = 10.0) -> tuple[list[dict[str, Any]], str | None]:
    """(GPUs, why there is no answer although `nvidia-smi` is there)"""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], None
    try:
        done = subprocess.run(
            [command, f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer in {timeout_s:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error}"
    if done.returncode != 0:
        return [], " ".join((done.stdout + done.stderr).split())[:300] or f"nvidia-smi exited {done.returncode}"
    found = parse_gpus(done.stdout)
    held = _query(command, "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", timeout_s)
    for gpu in found:
        gpu["processes"] = [process for uuid, process in parse_processes(held) if uuid == gpu["uuid"]]
    return found, None


def _query(command: str, what: str, timeout_s: float) -> str:
    """The answer of nvidia-smi, empty when it has none."""
    try:
        done = subprocess.run(
            [command, what, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=timeout_s
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_processes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(GPU uuid, process) of each line; a name may hold commas, so uuid, id and memory are taken from the ends."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) >= 4 and parts[1].isdigit():
            memory = int(parts[-1]) * 2**20 if parts[-1].isdigit() else None
            found.append((parts[0], {"pid": int(parts[1]), "name": ", ".join(parts[2:-1]), "memory": memory}))
    return found


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """The CSV answer of nvidia-smi to `GPU_QUERY`; memory in MiB, `[N/A]` where it is shared with the host."""

    def size(value: str) -> int | None:
        return int(value) * 2**20 if value.isdigit() else None

    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    return [
        {
            "index": int(index),
            "uuid": uuid,
            "name": name,
            "compute_capability": capability,
            "memory_total": size(total),
            "memory_free": size(free),
            "driver": driver,
            "processes": [],
        }
        for index, uuid, name, capability, total, free, driver in rows
    ]


def system() -> dict[str, Any]:
    """Sizes in bytes, after this process's cgroup and affinity."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used, quota = cgroup_limits(_CGROUP, _membership())
    total = min(memory.total, limit or memory.total)
    available = min(memory.available, max(total - (used or 0), 0)) if limit else memory.available
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    here = os.getcwd()
    return {
        "os": platform.system(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "arch": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "cores_usable": min(float(affinity), quota or float(affinity)),
        "memory_total": total,
        "memory_available": available,
        "shm_total": shm,
        "nofile": _limit(soft),
        "nofile_hard": _limit(hard),
        "memlock": _limit(memlock),
        "disk_path": here,
        "disk_free": shutil.disk_usage(here).free,
    }


def _limit(value: int) -> int:
    return -1 if value == resource.RLIM_INFINITY or value >= 2**63 - 1 else value


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _membership() -> str:
    """This process's path in the cgroup v2 tree: `/` inside most containers."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def cgroup_limits(root: Path, membership: str) -> tuple[int | None, int | None, float | None]:
    """(memory limit, memory in use there, CPU quota in cores) of a cgroup and its parents; v2, or v1 at the root."""
    memory, used, cores = None, None, None
    group = root / membership.lstrip("/")
    for folder in [group, *group.parents]:
        limit = _number(folder / "memory.max")
        if limit is not None and (memory is None or limit < memory):
            memory, used = limit, _number(folder / "memory.current")
        quota = _words(folder / "cpu.max")
        if len(quota) == 2 and quota[0].isdigit():
            share = int(quota[0]) / int(quota[1])
            cores = share if cores is None else min(cores, share)
        if folder == root:
            break
    if memory is None:
        memory = _number(root / "memory/memory.limit_in_bytes")
        used = _number(root / "memory/memory.usage_in_bytes")
    v1_quota, v1_period = _number(root / "cpu/cpu.cfs_quota_us"), _number(root / "cpu/cpu.cfs_period_us")
    if cores is None and v1_quota and v1_period:
        cores = v1_quota / v1_period
    return memory, used, cores


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if words and words[0].isdigit() else None
