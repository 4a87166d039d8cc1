"""What a run will hold in memory and on disk, in bytes, counted from the model's sizes and the recipe. Pure arithmetic.

For engines see their memory model (`engines/memory.py`), for trainers `plan/trainer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

from astracli.config.recipe import Recipe
from astracli.machine.memory import Component, MemoryRow, Place, safe
from astracli.models.adapter import MemoryShape

LIGHT_PROCESS = 150 * 2**20
"""A process with a tokenizer and an HTTP client."""
DELTA_SHARE = 0.15
"""The largest delta payload over a full one: what a high learning rate gives; 4B at 5e-6 gives about 0.04."""
COMFORT = 4
"""A shared GPU should leave an engine the KV cache of a full context for one in this many of its requests."""


def light_row(name: str, workers: int = 0) -> MemoryRow:
    """A process without a model, and the grading workers that it starts."""
    return MemoryRow(name, Component.PROCESS, "host", LIGHT_PROCESS * (1 + workers), "estimated")


def disk_rows(shape: MemoryShape, recipe: Recipe, checkpoint_bytes: int | None) -> list[MemoryRow]:
    """Checkpoints, published versions and the export of a training run, at their largest."""
    weights, keep = 2 * shape.parameters, recipe.weights.keep
    held = recipe.checkpoint.keep + 1 if recipe.checkpoint.every else 0
    held += 2 if recipe.checkpoint.best is not None else 0  # the best, and the one whose evaluation goes on
    size = 12 * shape.trained * held
    checkpoints = MemoryRow("trainer", Component.CHECKPOINTS, "disk", size, counts=(held,))
    if recipe.weights.transfer == "full":
        size = weights * (keep + 1)
        published = MemoryRow("trainer", Component.FULL_VERSIONS, "disk", size, counts=(keep + 1,))
    else:
        full = ceil(keep / recipe.weights.full_interval) + 1
        part = 4 * shape.adapters if recipe.weights.transfer == "adapter" else DELTA_SHARE * weights
        size = int(weights * full + part * keep)
        published = MemoryRow("trainer", Component.VERSIONS, "disk", size, "estimated", counts=(keep, full))
    exported = max(checkpoint_bytes or 0, weights)
    return [checkpoints, published, MemoryRow("trainer", Component.EXPORT, "disk", exported)]


def expected(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """The rows that a GPU should have room for: all but those that find another place when there is none."""
    return [row for row in rows if row.fixed or row.component is Component.CACHE_HOLES]


def solid(rows: Iterable[MemoryRow]) -> list[MemoryRow]:
    """Without the holes of torch's cache, which torch gives back when memory is short."""
    return [row for row in rows if row.component is not Component.CACHE_HOLES]


def padded(row: MemoryRow) -> int:
    """Its bytes, with the margin of an estimate."""
    return safe(row.bytes) if row.basis == "estimated" else row.bytes


def total(
    rows: Sequence[MemoryRow],
    *,
    where: Place,
    processes: Sequence[str] | None = None,
    fixed: bool = False,
    host: str | None = None,
) -> int:
    """Bytes of the rows in one place; of some processes only, of fixed rows only. `host`: None is the first."""
    return sum(
        row.bytes
        for row in rows
        if row.where == where
        and row.host == host
        and (processes is None or row.process in processes)
        and (row.fixed or not fixed)
    )


def on_gpu(
    rows: Sequence[MemoryRow], processes: Sequence[str], *, fixed: bool = False, with_margin: bool = False
) -> int:
    """The most bytes that processes hold on their GPU at once. With time sharing, only one has what others offload.
    `fixed`: of the fixed rows alone. `with_margin`: with the margin of what is estimated."""
    always, by_turns = 0, dict.fromkeys(processes, 0)
    for row in rows:
        if row.where == "gpu" and row.process in by_turns and (row.fixed or not fixed):
            size = padded(row) if with_margin else row.bytes
            if row.away:
                by_turns[row.process] += size
            else:
                always += size
    return always + max(by_turns.values(), default=0)
