"""What the processes of a run take, once a step: memory and descriptors of each, memory of its GPUs, size of the hub.

A line of metrics.jsonl each: {"process": "supervisor", "step", "of": NAME, "memory_bytes", "open_files"}, of a GPU
("gpu0") "memory_bytes", of the hub "hub_bytes". In a run that leaks nothing they stop growing early on.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from astracli.launch.launcher import Launcher
from astracli.runs import metrics
from astracli.runs.run_dir import RunDir

TIMEOUT_S = 10.0
MIB = 2**20


class UsageLog:
    """`step(n)` writes the lines of a step, beside the caller: nvidia-smi may take a second."""

    def __init__(self, run: RunDir, launcher: Launcher, gpus: Collection[int]):
        """`gpus`: those of the run, by the numbers that nvidia-smi gives them."""
        self._run, self._launcher, self._gpus = run, launcher, frozenset(gpus)
        self._writer = ThreadPoolExecutor(1, "usage")
        self._writing: Future[None] | None = None
        self._step = -1

    def step(self, step: int) -> Future[None] | None:
        """Ends when the lines are written. None: a step that comes while those of another are written gets none."""
        if step == self._step or (self._writing is not None and not self._writing.done()):
            return None
        self._step = step
        self._writing = self._writer.submit(self._write, step)
        return self._writing

    def _write(self, step: int) -> None:
        records: list[dict[str, Any]] = [
            {"of": name, "memory_bytes": memory, "open_files": files}
            for name, (memory, files) in self._launcher.usage().items()
        ]
        records += ({"of": f"gpu{n}", "memory_bytes": used} for n, used in gpu_memory(self._gpus))
        records.append({"of": "hub", "hub_bytes": database_bytes(self._run.hub_sqlite)})
        metrics.append(self._run.metrics_jsonl, [{"process": "supervisor", "step": step} | r for r in records])

    def close(self) -> None:
        self._writer.shutdown()


def database_bytes(path: Path) -> int:
    """Of an SQLite file and what lies beside it (`-wal`, `-shm`)."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def gpu_memory(gpus: Collection[int]) -> Iterator[tuple[int, int]]:
    """(number, bytes in use, of all processes) of each; nothing where nvidia-smi does not answer."""
    command = shutil.which("nvidia-smi") if gpus else None
    if command is None:
        return
    words = [command, "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return
    for line in done.stdout.splitlines():
        number, _, used = line.partition(",")
        if used.strip().isdigit() and int(number) in gpus:
            yield int(number), int(used) * MIB
