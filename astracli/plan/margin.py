"""The margin of each GPU of a plan: what is left free there for what its estimates miss. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from astracli.machine.memory import MARGIN, MemoryRow, words
from astracli.plan import memory


@dataclass(frozen=True)
class Margin:
    """Of one GPU, in bytes."""

    gpu: int
    """Its index as nvidia-smi counts it."""
    planned: int
    """What its processes hold at the fullest moment, without what finds another place where there is no room."""
    needed: int
    """Free beside that: `MARGIN` of the rows that are estimated."""
    left: int
    """What the GPU has beside what is planned; below 0 it does not fit."""

    @property
    def short(self) -> bool:
        return self.left < self.needed


def margins(
    rows: Sequence[MemoryRow], gpu_map: Mapping[int, Sequence[str]], sizes: Mapping[int, int]
) -> tuple[Margin, ...]:
    """Of every GPU of the plan whose size is known."""
    found = []
    expected = memory.expected(rows)
    padded = memory.with_margin(expected)
    for gpu, names in gpu_map.items():
        planned = memory.on_gpu(expected, names)
        if gpu in sizes and planned:
            needed = memory.on_gpu(padded, names) - planned
            found.append(Margin(gpu, planned, needed, sizes[gpu] - planned))
    return tuple(found)


def reasons(found: Sequence[Margin]) -> list[tuple[str, str, str]]:
    """(what, where, why) of each kind of GPU, for the table of placements."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for each in found:
        alike.setdefault((each.planned, each.needed, each.left), []).append(each.gpu)
    return [
        (
            f"margin of GPU {_span(gpus)}",
            words(needed),
            f"{MARGIN:.0%} of what is estimated; {words(planned)} are planned of {words(planned + left)}, "
            f"which leaves {words(max(left, 0))}",
        )
        for (planned, needed, left), gpus in alike.items()
    ]


def warnings(found: Sequence[Margin]) -> list[str]:
    """GPUs whose plan fits, and has less room than its estimates need."""
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
