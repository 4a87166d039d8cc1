"""Where a full version of the weights waits beside an engine until its pause. Pure.

In GPU memory, where all that its GPU holds, and its margin, leave room; else in pinned host memory; where neither has
room, in its file, from which it is copied while the engine stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from astracli.config.recipe import Recipe
from astracli.machine.component import Component
from astracli.machine.facts import Machine
from astracli.machine.memory import MemoryRow, words
from astracli.models.adapter import MemoryShape
from astracli.plan import memory
from astracli.plan.placement import Placement
from astracli.plan.types import ProcessPlan
from astracli.process.config import Role
from astracli.process.layout import Staging


def row(name: str, shape: MemoryShape, where: Staging, *, time_sharing: bool = False) -> MemoryRow | None:
    """What a full version takes in the engine `name` while it waits; None: nothing beside its file."""
    if where == "file":
        return None
    return MemoryRow(
        name, Component.FULL_VERSION, where, 2 * shape.parameters, fixed=False, away=time_sharing and where == "gpu"
    )


def decide(
    processes: Sequence[ProcessPlan],
    rows: Sequence[MemoryRow],
    shape: MemoryShape,
    recipe: Recipe,
    placement: Placement,
    facts: Machine,
) -> tuple[Placement, list[MemoryRow]]:
    """The placement with its `staging`, and all rows with those of the versions that wait. `rows`: everything else."""
    engines = [process for process in processes if process.role is Role.ENGINE]
    size, sizes, host = 2 * shape.parameters, facts.gpu_sizes, facts.system.memory_total

    def with_versions(where: Staging) -> list[MemoryRow]:
        found = (row(engine.name, shape, where, time_sharing=placement.time_sharing) for engine in engines)
        return [*rows, *(each for each in found if each is not None)]

    def on_gpu(gpu: int) -> int:
        names = [process.name for process in processes if gpu in process.gpus]
        return memory.on_gpu(memory.with_margin(with_versions("gpu")), names)

    gpus = {gpu for engine in engines for gpu in engine.gpus}
    where: Staging = "file"
    rare = placement.shared and recipe.weights.transfer == "delta"  # the trainer makes more of the memory
    if gpus and not rare and all(gpu in sizes and on_gpu(gpu) <= sizes[gpu] for gpu in gpus):
        where, why = "gpu", f"room for {words(size)} more"
    elif (need := memory.total(with_versions("host"), where="host")) <= host:
        lacking = "deltas seldom need it beside a trainer" if rare else f"no GPU memory for {words(size)} more"
        where, why = "host", f"{lacking}; pinned"
    else:
        why = f"the host would need {words(need)}, it has {words(host)}: copied in the pause"
    if not gpus:
        return replace(placement, staging=where), with_versions(where)
    reason = ("a full version", where, f"before its pause: {why}")
    return replace(placement, staging=where, reasons=(*placement.reasons, reason)), with_versions(where)
