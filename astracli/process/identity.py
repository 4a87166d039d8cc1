"""Which process an id means: told by its start since this machine booted, which no step of a clock changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Identity:
    """Of a process on this host. `boot` and `ticks` are None where the system does not tell (no /proc)."""

    pid: int
    create_time: float
    """Start, seconds since 1970: what psutil says. A step of the clock moves it."""
    boot: str | None = None
    """Of the kernel that runs: another one has other processes."""
    ticks: int | None = None
    """Start, clock ticks since that boot."""

    def lives(self) -> bool:
        """Whether that process runs. A zombie does not."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if self.boot is not None and self.ticks is not None:
                return (self.boot, self.ticks) == (_boot(), _ticks(self.pid))
            return abs(float(process.create_time()) - self.create_time) < 1.0
        except psutil.NoSuchProcess:
            return False


def of(pid: int) -> Identity:
    """The identity of a running process. Raises psutil.NoSuchProcess."""
    return Identity(pid, float(psutil.Process(pid).create_time()), _boot(), _ticks(pid))


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; the name in field 2 may hold anything but ends with the last bracket."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
