"""What each GPU and each host of a plan will hold, what they have, and the margin that is left for estimates. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from astracli.machine.memory import MARGIN, MemoryRow, words
from astracli.plan.memory import expected, on_gpu, total
from astracli.plan.offload import Reason
from astracli.plan.seats import GpuId

if TYPE_CHECKING:
    from astracli.plan.types import LaunchPlan

COLUMNS = ("gpu", "at least", "under full load", "has", "processes")


@dataclass(frozen=True)
class Use:
    """Bytes on one GPU, or on the host."""

    place: str
    """The GPU's index as nvidia-smi counts it, or `host`; on another host than the first `b:0` and `host b`."""
    processes: Sequence[str]
    at_least: int
    """From the start, whatever the load."""
    under_load: int
    """The most that is planned for."""
    has: int | None
    """None = the machine has no such GPU, or does not say its size."""


def uses(plan: LaunchPlan) -> list[Use]:
    """Every GPU of the plan in order, then the hosts; empty when no GPU is used, or the model's sizes are not known."""
    if not plan.model or not plan.gpu_map:
        return []
    found = []
    for gpu, names in plan.gpu_map.items():
        least, most = (on_gpu(plan.memory, names, fixed=fixed) for fixed in (True, False))
        found.append(Use(str(gpu), names, least, most, plan.gpu_sizes.get(gpu)))
    return [*found, *(_host_use(plan, host) for host in dict.fromkeys(row.host for row in plan.memory))]


def _host_use(plan: LaunchPlan, host: str | None) -> Use:
    least, most = (total(plan.memory, where="host", fixed=fixed, host=host) for fixed in (True, False))
    everyone = list(dict.fromkeys(row.process for row in plan.memory if row.where == "host" and row.host == host))
    size = plan.host_size if host is None else plan.host_sizes.get(host)
    return Use("host" if host is None else f"host {host}", everyone, least, most, size)


def rows(found: Sequence[Use]) -> list[tuple[str, ...]]:
    """`uses` as text under `COLUMNS`; neighbours that hold the same share a row: `0-3`."""
    return [_row(*group) for _, group in groupby(found, _kind)]


def _kind(use: Use) -> tuple[object, ...]:
    roles = tuple(name.rstrip("0123456789") for name in use.processes)
    host = use.place if use.place.startswith("host") else use.place.rpartition(":")[0]
    return host, roles, use.at_least, use.under_load, use.has


def _row(first: Use, *others: Use) -> tuple[str, ...]:
    last = others[-1] if others else first
    where = f"{first.place}-{last.place.rpartition(':')[2]}" if others else first.place
    pairs = zip(first.processes, last.processes, strict=True)
    names = "all" if first.place.startswith("host") else ", ".join(a if a == b else f"{a} to {b}" for a, b in pairs)
    has = "none" if first.has is None else words(first.has)
    return where, words(first.at_least), words(first.under_load), has, names


@dataclass(frozen=True)
class Margin:
    """What is left free on one GPU for what the estimates miss, in bytes."""

    gpu: GpuId
    planned: int
    """What its processes hold at the fullest moment, without what goes elsewhere when there is no room."""
    needed: int
    """To be free beside that: `MARGIN` of the rows that are estimated."""
    left: int
    """What the GPU has beside what is planned; below 0 it does not fit."""

    @property
    def short(self) -> bool:
        return self.left < self.needed


def margins(
    rows: Sequence[MemoryRow], gpu_map: Mapping[GpuId, Sequence[str]], sizes: Mapping[GpuId, int]
) -> tuple[Margin, ...]:
    """Of every GPU of the plan whose size is known."""
    found, there = [], expected(rows)
    for gpu, names in gpu_map.items():
        planned = on_gpu(there, names)
        if gpu in sizes and planned:
            needed = on_gpu(there, names, with_margin=True) - planned
            found.append(Margin(gpu, planned, needed, sizes[gpu] - planned))
    return tuple(found)


def reasons(found: Sequence[Margin]) -> list[Reason]:
    """Each kind of GPU as a row of the table of placements."""
    alike: dict[tuple[str | None, int, int, int], list[GpuId]] = {}
    for each in found:
        alike.setdefault((each.gpu.host, each.planned, each.needed, each.left), []).append(each.gpu)
    return [
        Reason(
            f"margin of GPU {_span(gpus)}",
            words(needed),
            f"{MARGIN:.0%} of what is estimated; {words(planned)} are planned of {words(planned + left)}, "
            f"which leaves {words(max(left, 0))}",
        )
        for (_, planned, needed, left), gpus in alike.items()
    ]


def warnings(found: Sequence[Margin]) -> list[str]:
    """GPUs whose plan fits, but leaves less room than its estimates need."""
    return [
        f"GPU {each.gpu}: {words(each.left)} are left beside the {words(each.planned)} that are planned, where the "
        f"estimates need a margin of {words(each.needed)}: it may run out of memory"
        for each in found
        if 0 <= each.left < each.needed
    ]


def _span(gpus: Sequence[GpuId]) -> str:
    """GPUs of one host: `4 to 7`, or each where they do not follow one another."""
    indexes = [gpu.index for gpu in gpus]
    whole = len(gpus) > 2 and indexes == list(range(indexes[0], indexes[-1] + 1))
    return f"{gpus[0]} to {indexes[-1]}" if whole else " and ".join(map(str, gpus))
