"""What is said of a machine: memory that something needs, problems of a plan, checks of `astra doctor`. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["gpu", "host", "disk"]
Basis = Literal["counted", "estimated"]
Status = Literal["ok", "warn", "fail", "skip"]
MARGIN = 0.5
"""Of what is estimated of a GPU, what a plan leaves free there besides. In the runs of docs/benchmarks.md peaks were
over their plans by at most a fifth of what is estimated, all on one kind of GPU."""


@dataclass(frozen=True)
class MemoryRow:
    process: str
    what: str
    where: Place
    bytes: int
    basis: Basis = "counted"
    fixed: bool = True
    """Needed from the start; False = grows with load, and the engine or trainer can live with less."""
    away: bool = False
    """Not there while another process has its turn on the GPU."""


@dataclass(frozen=True)
class Problem:
    """Something that this machine lacks for the plan."""

    kind: Literal["gpus", "memory", "package", "system", "disk", "checkpoint"]
    what: str
    """Short: `8 GPUs (this machine has 2)`."""
    message: str
    hint: str | None
    blocking: bool = True
    """False = the run mends it by itself (a download)."""


@dataclass(frozen=True)
class Check:
    name: str
    group: str
    status: Status
    value: str
    """What was found."""
    why: str = ""
    """Why it matters, one line; empty when all is well and there is nothing to say."""
    fix: str = ""
    """The next command or setting."""


def safe(estimated: int) -> int:
    """Bytes to reckon with where so many are estimated."""
    return estimated + int(MARGIN * estimated)


def words(count: int) -> str:
    """Bytes for people: `7.83 GiB`, `34.0 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
