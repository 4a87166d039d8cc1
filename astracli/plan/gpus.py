"""What each GPU and the host of a plan will hold, what they have, and the margin that is left for estimates. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from astracli.machine.memory import MARGIN, MemoryRow, words
from astracli.plan.memory import expected, on_gpu, total
from astracli.plan.offload import Reason

if TYPE_CHECKING:
    from astracli.plan.types import LaunchPlan

COLUMNS = ("gpu", "at least", "under full load", "has", "processes")


@dataclass(frozen=True)
class Use:
    """Bytes on one GPU, or on the host."""

    place: str
    """The GPU's index as nvidia-smi counts it, or `host`."""
    processes: Sequence[str]
    at_least: int
    """From the start, whatever the load."""
    under_load: int
    """The most that is planned for."""
    has: int | None
    """None = the machine has no such GPU, or does not say its size."""


def uses(plan: LaunchPlan) -> list[Use]:
    """Every GPU of the plan in order, then the host; empty when no GPU is used, or the model's sizes are not known."""
    if not plan.model or not plan.gpu_map:
        return []
    found = []
    for gpu, names in plan.gpu_map.items():
        least, most = (on_gpu(plan.memory, names, fixed=fixed) for fixed in (True, False))
        found.append(Use(str(gpu), names, least, most, plan.gpu_sizes.get(gpu)))
    least, most = (total(plan.memory, where="host", fixed=fixed) for fixed in (True, False))
    everyone = list(dict.fromkeys(row.process for row in plan.memory if row.where == "host"))
    return [*found, Use("host", everyone, least, most, plan.host_size)]


def rows(found: Sequence[Use]) -> list[tuple[str, ...]]:
    """`uses` as text under `COLUMNS`; neighbours that hold the same share a row: `0-3`."""
    return [_row(*group) for _, group in groupby(found, _kind)]


def _kind(use: Use) -> tuple[object, ...]:
    roles = tuple(name.rstrip("0123456789") for name in use.processes)
    return use.place == "host", roles, use.at_least, use.under_load, use.has


def _row(first: Use, *others: Use) -> tuple[str, ...]:
    last = others[-1] if others else first
    where = f"{first.place}-{last.place}" if others else first.place
    pairs = zip(first.processes, last.processes, strict=True)
    names = "all" if first.place == "host" else ", ".join(a if a == b else f"{a} to {b}" for a, b in pairs)
    has = "none" if first.has is None else words(first.has)
    return where, words(first.at_least), words(first.under_load), has, names


@dataclass(frozen=True)
class Margin:
    """What is left free on one GPU for what the estimates miss, in bytes."""

    gpu: int
    """Its index as nvidia-smi counts it."""
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
    rows: Sequence[MemoryRow], gpu_map: Mapping[int, Sequence[str]], sizes: Mapping[int, int]
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
    alike: dict[tuple[int, int, int], list[int]] = {}
    for each in found:
        alike.setdefault((each.planned, each.needed, each.left), []).append(each.gpu)
    return [
        Reason(
            f"margin of GPU {_span(gpus)}",
            words(needed),
            f"{MARGIN:.0%} of what is estimated; {words(planned)} are planned of {words(planned + left)}, "
            f"which leaves {words(max(left, 0))}",
        )
        for (planned, needed, left), gpus in alike.items()
    ]


def warnings(found: Sequence[Margin]) -> list[str]:
    """GPUs whose plan fits, but leaves less room than its estimates need."""
    return [
        f"GPU {each.gpu}: {words(each.left)} are left beside the {words(each.planned)} that are planned, where the "
        f"estimates need a margin of {words(each.needed)}: it may run out of memory"
        for each in found
        if 0 <= each.left < each.needed
    ]


def _span(gpus: Sequence[int]) -> str:
    """`4 to 7`, or each where they do not follow one another."""
    whole = len(gpus) > 2 and list(gpus) == list(range(gpus[0], gpus[-1] + 1))
    return f"{gpus[0]} to {gpus[-1]}" if whole else " and ".join(map(str, gpus))
