"""Where a full version of the weights waits beside an engine until its pause. Pure.

In GPU memory, where the GPU has room for it beside all else and the margin. Otherwise in pinned host memory. Where
neither has room, in its file, from which it is copied while the engine is paused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from astracli.config.recipe import Recipe
from astracli.machine.memory import Component, MemoryRow, words
from astracli.models.adapter import MemoryShape
from astracli.plan import memory
from astracli.plan.offload import Reason
from astracli.plan.placement import Placement
from astracli.plan.seats import GpuId, Host
from astracli.plan.types import ProcessPlan
from astracli.process.config import Role
from astracli.process.layout import Staging, Where


def decide(
    processes: Sequence[ProcessPlan],
    rows: Sequence[MemoryRow],
    shape: MemoryShape,
    recipe: Recipe,
    placement: Placement,
    sizes: Mapping[GpuId, int],
    hosts: Mapping[Host, int],
) -> tuple[Placement, list[MemoryRow]]:
    """The placement with its `staging`, and all rows with those of the versions that wait. `rows`: everything else.
    `sizes`, `hosts`: bytes of each GPU and of each host's memory, as far as they are known."""
    engines = [process for process in processes if process.role is Role.ENGINE]
    size = 2 * shape.parameters

    def with_versions(where: Where) -> list[MemoryRow]:
        away = placement.time_sharing and where == "gpu"
        waiting = Component.FULL_VERSION
        return [*rows, *(MemoryRow(e.name, waiting, where, size, fixed=False, away=away, host=e.host) for e in engines)]

    def on_gpu(gpu: GpuId) -> int:
        names = [process.name for process in processes if gpu in process.gpu_ids]
        return memory.on_gpu(with_versions("gpu"), names, with_margin=True)

    gpus = {gpu for engine in engines for gpu in engine.gpu_ids}
    needs = {host: memory.total(with_versions("host"), where="host", host=host) for host in {e.host for e in engines}}
    tight = [host for host, need in needs.items() if need > hosts.get(host, need)]
    rare = placement.shared and recipe.weights.transfer == "delta"  # the trainer makes more of the memory
    staging: Staging = "file"
    if gpus and not rare and all(gpu in sizes and on_gpu(gpu) <= sizes[gpu] for gpu in gpus):
        staging, why = "gpu", f"room for {words(size)} more"
    elif not tight:
        lacking = "deltas seldom need it beside a trainer" if rare else f"no GPU memory for {words(size)} more"
        staging, why = "host", f"{lacking}; pinned"
    else:
        home = tight[0]
        named = "the host" if home is None else f"host {home}"
        why = f"{named} would need {words(needs[home])}, it has {words(hosts[home])}: copied in the pause"
    reasons = [Reason("a full version", staging, f"before its pause: {why}")] if gpus else []
    placement = replace(placement, staging=staging, reasons=(*placement.reasons, *reasons))
    return placement, list(rows) if staging == "file" else with_versions(staging)
