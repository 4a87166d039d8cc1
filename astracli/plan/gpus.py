"""What each GPU and the host of a plan will hold, beside what they have. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from astracli.machine.memory import words
from astracli.plan.memory import on_gpu, total

if TYPE_CHECKING:
    from astracli.plan.types import LaunchPlan

COLUMNS = ("gpu", "at least", "under full load", "has", "processes")


@dataclass(frozen=True)
class Use:
    """Bytes on one GPU, or on the host."""

    place: str
    """The GPU's index as nvidia-smi counts it, or `host`."""
    processes: tuple[str, ...]
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
        found.append(Use(str(gpu), tuple(names), least, most, plan.gpu_sizes.get(gpu)))
    least, most = (total(plan.memory, where="host", fixed=fixed) for fixed in (True, False))
    everyone = tuple(dict.fromkeys(row.process for row in plan.memory if row.where == "host"))
    return [*found, Use("host", everyone, least, most, plan.host_size)]


def memory_by_place(plan: LaunchPlan) -> list[dict[str, Any]]:
    """`uses` as plain JSON."""
    return [asdict(use) | {"processes": list(use.processes)} for use in uses(plan)]


def rows(found: Sequence[Use]) -> list[tuple[str, ...]]:
    """`uses` as text under `COLUMNS`; neighbours that hold the same stand once: `0-3`."""
    alike: list[list[Use]] = []
    for use in found:
        if alike and _kind(alike[-1][0]) == _kind(use):
            alike[-1].append(use)
        else:
            alike.append([use])
    return [_row(group[0], group[-1]) for group in alike]


def _kind(use: Use) -> tuple[object, ...]:
    roles = tuple(name.rstrip("0123456789") for name in use.processes)
    return use.place == "host", roles, use.at_least, use.under_load, use.has


def _row(first: Use, last: Use) -> tuple[str, ...]:
    where = first.place if first is last else f"{first.place}-{last.place}"
    pairs = zip(first.processes, last.processes, strict=True)
    names = "all" if first.place == "host" else ", ".join(a if a == b else f"{a} to {b}" for a, b in pairs)
    has = "none" if first.has is None else words(first.has)
    return where, words(first.at_least), words(first.under_load), has, names
