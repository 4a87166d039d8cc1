"""What processes hold in memory and on disk: one row for each part, in bytes. `counted` rows follow from sizes,
`estimated` ones carry a factor that depends on code or data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from astracli.machine.component import Component

Place = Literal["gpu", "host", "disk"]
Basis = Literal["counted", "estimated"]

TORCH_PROCESS = 340 * 2**20
"""A process that has imported torch and transformers (measured)."""
CUDA_CONTEXT = 2**30
"""Context, kernels, cuBLAS workspaces and what the allocator rounds up, a process and GPU (estimated)."""
MARGIN = 0.5
"""Of what is estimated of a GPU, what a plan leaves free there besides. In the runs of docs/benchmarks.md peaks were
over their plans by at most a fifth of what is estimated, all on one kind of GPU."""


@dataclass(frozen=True)
class MemoryRow:
    process: str
    component: Component
    where: Place
    bytes: int
    basis: Basis = "counted"
    fixed: bool = True
    """Needed from the start; False = grows with load, and the engine or trainer can live with less."""
    away: bool = False
    """Not there while another process has its turn on the GPU."""
    offloaded: bool = False
    """Host memory that holds what is away during the other's turn."""
    counts: tuple[int, ...] = ()
    """For the blanks in the words of its component."""


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
