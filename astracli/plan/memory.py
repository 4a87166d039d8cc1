"""What a run will hold in memory and on disk, in bytes, counted from the model's sizes and the recipe. Pure arithmetic.

What an engine holds, its own memory model says (`engines/memory.py`); what a trainer does, `plan/trainer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from astracli.config.recipe import Recipe
from astracli.machine.memory import MemoryRow, Place, safe
from astracli.models.adapter import MemoryShape

LIGHT_PROCESS = 150 * 2**20
"""A process with a tokenizer and an HTTP client."""
DELTA_SHARE = 0.15
"""A delta payload over a full one, at most: what a high learning rate gives; 4B at 5e-6 gives about 0.04."""

COMFORT = 4
"""A shared GPU should leave an engine the KV cache of this part of its requests at full context: one in four."""
HOLES = "holes of torch's cache"
"""A row that is there at the fullest moment, and that torch gives back where memory is short."""


def light_row(name: str, workers: int = 0) -> MemoryRow:
    """A process without a model, and the grading workers that it starts."""
    return MemoryRow(name, "process", "host", LIGHT_PROCESS * (1 + workers), "estimated")


def disk_rows(shape: MemoryShape, recipe: Recipe, checkpoint_bytes: int | None) -> list[MemoryRow]:
    """Checkpoints, published versions and the export of a training run, at their largest."""
    weights, keep = 2 * shape.parameters, recipe.weights.keep
    held = recipe.checkpoint.keep + 1 if recipe.checkpoint.every else 0
    checkpoints = MemoryRow("trainer", f"{held} checkpoints (one being written)", "disk", 12 * shape.parameters * held)
    if recipe.weights.transfer == "full":
        published = MemoryRow("trainer", f"{keep + 1} published versions, full", "disk", weights * (keep + 1))
    else:
        full = ceil(keep / recipe.weights.full_interval) + 1
        size = int(weights * (full + DELTA_SHARE * keep))
        what = f"{keep} published versions, {full} of them full"
        published = MemoryRow("trainer", what, "disk", size, "estimated")
    exported = max(checkpoint_bytes or 0, weights)
    return [checkpoints, published, MemoryRow("trainer", "export", "disk", exported)]


def expected(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """Those that a GPU must have room for: all but what finds another place where there is none."""
    return [row for row in rows if row.fixed or row.what == HOLES]


def padded(row: MemoryRow) -> int:
    """Its bytes, with the margin that they need."""
    return safe(row.bytes) if row.basis == "estimated" else row.bytes


def with_margin(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    return [replace(row, bytes=padded(row)) for row in rows]


def total(
    rows: Sequence[MemoryRow], *, where: Place, processes: Sequence[str] | None = None, fixed: bool = False
) -> int:
    """Sum in bytes of the rows of one place, of some processes, and of what is fixed only."""
    return sum(
        row.bytes
        for row in rows
        if row.where == where and (processes is None or row.process in processes) and (row.fixed or not fixed)
    )


def on_gpu(rows: Sequence[MemoryRow], processes: Sequence[str], *, fixed: bool = False) -> int:
    """Most bytes that processes hold on a GPU of theirs at once, turns taken into account."""
    there = [row for row in rows if row.where == "gpu" and row.process in processes and (row.fixed or not fixed)]
    turns = [sum(row.bytes for row in there if row.away and row.process == name) for name in processes]
    return sum(row.bytes for row in there if not row.away) + max(turns, default=0)
