"""The facts of this machine: `probe` asks the operating system, cgroups, package metadata and `nvidia-smi`.

It never imports torch. What a recipe needs of the machine is looked up by `doctor/gather.py`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from astracli.machine import packages
from astracli.machine.facts import Compilers, Gpu, GpuProcess, Machine, PeerLink, Python, System

GPU_QUERY = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
_CGROUP = Path("/sys/fs/cgroup")
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


def probe(families: list[str] | None = None) -> Machine:
    """Reads this machine, in under half a second unless `nvidia-smi` is slow. `families`: see `packages.describe`."""
    found, gpu_error = gpus()
    return Machine(
        system=system(),
        python=Python(version=platform.python_version(), executable=sys.executable, venv=sys.prefix != sys.base_prefix),
        gpus=tuple(found),
        gpu_error=gpu_error,
        peer_link=peer_link() if len(found) > 1 else None,
        compilers=compilers(),
        env={name: os.environ.get(name) for name in ENVIRONMENT},
        **packages.describe(families),
    )


def compilers() -> Compilers:
    """C compiler, nvcc, and the CUDA C++ core headers of that nvcc."""
    nvcc = shutil.which("nvcc")
    home = Path(os.path.realpath(nvcc)).parents[1] if nvcc else None
    places = [home / part for part in ("include", "include/cccl", "targets/x86_64-linux/include/cccl")] if home else []
    cccl = next((str(place) for place in places if (place / "cuda" / "std").is_dir()), None)
    return Compilers(cc=shutil.which("cc") or shutil.which("gcc"), nvcc=nvcc, cccl=cccl)


def gpus(timeout_s: float = 10.0) -> tuple[list[Gpu], str | None]:
    """(GPUs, error). The error says why `nvidia-smi` is installed but did not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], None
    try:
        done = _query(command, f"--query-gpu={','.join(GPU_QUERY)}", timeout_s)
        if done.returncode != 0:
            return [], " ".join((done.stdout + done.stderr).split())[:300] or f"nvidia-smi exited {done.returncode}"
        held = _query(command, "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", timeout_s)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer in {timeout_s:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error}"
    return parse_gpus(done.stdout, held.stdout if held.returncode == 0 else ""), None


def peer_link(timeout_s: float = 10.0) -> PeerLink | None:
    """The slowest way between two GPUs of this machine; None when nvidia-smi does not say it."""
    command = shutil.which("nvidia-smi")
    try:
        done = subprocess.run([command or "", "topo", "-m"], capture_output=True, text=True, timeout=timeout_s)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return parse_peers(done.stdout) if done.returncode == 0 else None


def parse_peers(text: str) -> PeerLink | None:
    """From the matrix that `nvidia-smi topo -m` prints: a line for each GPU, and in it how it reaches each GPU (`NV18`:
    18 NVLinks; `PIX`, `NODE`, `SYS` and others: over PCIe; `X`: itself). Terminal codes underline its head."""
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    rows = [words[1:] for words in lines if words and re.fullmatch(r"GPU\d+", words[0]) and "X" in words]
    pairs = {way for words in rows for way in words[: len(rows)] if way != "X"}
    if not pairs:
        return None
    return "NVLink" if all(re.fullmatch(r"NV\d+", way) for way in pairs) else "PCIe"


def _query(command: str, what: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    words = [command, what, "--format=csv,noheader,nounits"]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)


def parse_processes(text: str) -> list[tuple[str, GpuProcess]]:
    """(GPU uuid, process) of each line. A name may contain commas, so the other fields are read from both ends."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) >= 4 and parts[1].isdigit():
            process = GpuProcess(pid=int(parts[1]), name=", ".join(parts[2:-1]), memory=_mib(parts[-1]))
            found.append((parts[0], process))
    return found


def parse_gpus(text: str, processes: str = "") -> list[Gpu]:
    """GPUs from the CSV that nvidia-smi prints for `GPU_QUERY` and, in `processes`, for its compute processes."""
    held = parse_processes(processes)
    return [
        Gpu(
            index=int(index),
            uuid=uuid,
            name=name,
            compute_capability=capability,
            memory_total=_mib(total),
            memory_free=_mib(free),
            driver=driver,
            processes=tuple(process for place, process in held if place == uuid),
        )
        for index, uuid, name, capability, total, free, driver in (
            (part.strip() for part in line.split(",")) for line in text.splitlines() if line.strip()
        )
    ]


def _mib(value: str) -> int | None:
    """MiB to bytes; None for `[N/A]`, which nvidia-smi prints where GPU and host share their memory."""
    return int(value) * 2**20 if value.isdigit() else None


def system() -> System:
    """The operating system's limits for this process: its cgroup and CPU affinity count. Sizes in bytes."""
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
    return System(
        os=platform.system(),
        kernel=platform.release(),
        libc=packages.libc(),
        arch=platform.machine(),
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        cores_usable=min(float(affinity), quota or float(affinity)),
        memory_total=total,
        memory_available=available,
        shm_total=shm,
        nofile=_limit(soft),
        nofile_hard=_limit(hard),
        memlock=_limit(memlock),
        disk_path=here,
        disk_free=shutil.disk_usage(here).free,
    )


def _limit(value: int) -> int:
    return -1 if value == resource.RLIM_INFINITY or value >= 2**63 - 1 else value


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _membership() -> str:
    """This process's path in the cgroup v2 tree; `/` in most containers."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def cgroup_limits(root: Path, membership: str) -> tuple[int | None, int | None, float | None]:
    """(memory limit, memory used under that limit, CPU quota in cores): the tightest of a cgroup and its parents.

    Reads cgroup v2, else v1 at the root."""
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
