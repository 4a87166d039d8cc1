"""Where a full version of the weights waits beside an engine until its pause. Pure.

In GPU memory, where the GPU has room for it beside all else and the margin. Otherwise in pinned host memory. Where
neither has room, in its file, from which it is copied while the engine is paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from astracli.config.recipe import Recipe
from astracli.machine.facts import Machine
from astracli.machine.memory import Component, MemoryRow, words
from astracli.models.adapter import MemoryShape
from astracli.plan import memory
from astracli.plan.offload import Reason
from astracli.plan.placement import Placement
from astracli.plan.types import ProcessPlan
from astracli.process.config import Role
from astracli.process.layout import Staging, Where


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

    def with_versions(where: Where) -> list[MemoryRow]:
        away = placement.time_sharing and where == "gpu"
        waiting = Component.FULL_VERSION
        return [*rows, *(MemoryRow(e.name, waiting, where, size, fixed=False, away=away) for e in engines)]

    def on_gpu(gpu: int) -> int:
        names = [process.name for process in processes if gpu in process.gpus]
        return memory.on_gpu(with_versions("gpu"), names, with_margin=True)

    gpus = {gpu for engine in engines for gpu in engine.gpus}
    rare = placement.shared and recipe.weights.transfer == "delta"  # the trainer makes more of the memory
    staging: Staging = "file"
    if gpus and not rare and all(gpu in sizes and on_gpu(gpu) <= sizes[gpu] for gpu in gpus):
        staging, why = "gpu", f"room for {words(size)} more"
    elif (need := memory.total(with_versions("host"), where="host")) <= host:
        lacking = "deltas seldom need it beside a trainer" if rare else f"no GPU memory for {words(size)} more"
        staging, why = "host", f"{lacking}; pinned"
    else:
        why = f"the host would need {words(need)}, it has {words(host)}: copied in the pause"
    reasons = [Reason("a full version", staging, f"before its pause: {why}")] if gpus else []
    placement = replace(placement, staging=staging, reasons=(*placement.reasons, *reasons))
    return placement, list(rows) if staging == "file" else with_versions(staging)
