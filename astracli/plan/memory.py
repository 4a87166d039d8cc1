"""What a run will hold in memory and on disk, in bytes, counted from the model's sizes and the recipe. Pure arithmetic.

`counted` rows follow from the sizes; `estimated` ones carry a factor that depends on code or data. Of a GPU a plan
leaves a margin free for what estimates miss (`MARGIN`).
Letters: P parameters, R trainer ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from astracli.config.recipe import Recipe
from astracli.models.adapter import MemoryShape

Place = Literal["gpu", "host", "disk"]
Basis = Literal["counted", "estimated"]

TORCH_PROCESS = 340 * 2**20
"""A process that has imported torch and transformers (measured)."""
LIGHT_PROCESS = 150 * 2**20
"""A process with a tokenizer and an HTTP client."""
CUDA_CONTEXT = 2**30
"""Context, kernels, cuBLAS workspaces and what the allocator rounds up, a process and GPU (estimated)."""
CUDA_GRAPHS = 2**30
"""What an engine's captured decode graphs hold (estimated)."""
SAMPLING_BUFFERS = 5
"""fp32 arrays of [requests, vocabulary] that sampling holds at once (estimated)."""
ACTIVATION_UNITS = 80
"""Bytes a token and hidden unit of a block whose adapter says nothing: the most of the families that we know."""
DELTA_SHARE = 0.15
"""A delta payload over a full one, at most: what a high learning rate gives; 4B at 5e-6 gives about 0.04."""

COMFORT = 4
"""A shared GPU should leave an engine the KV cache of this part of its requests at full context: one in four."""
MARGIN = 0.5
"""Of what is estimated of a GPU, what a plan leaves free there besides. In the runs of docs/benchmarks.md peaks were
over their plans by at most a fifth of what is estimated, all on one kind of GPU."""
HOLES = "holes of torch's cache"
"""A row that is there at the fullest moment, and that torch gives back where memory is short."""
STAGED_BYTES = 6 * 0.05
"""An index and a value for each of one parameter in twenty: a delta that waits on the GPU for its pause. What finds no
room there waits in pinned memory."""


@dataclass(frozen=True)
class MemoryRow:
    process: str
    what: str
    where: Place
    bytes: int
    basis: Basis = "counted"
    fixed: bool = True
    """Needed from the start; False = grows with load, and the engine or trainer can live with less."""
    away: bool = False
    """Not there while another process uses the GPU."""


def engine_rows(
    name: str, shape: MemoryShape, recipe: Recipe, device: str, *, static: int | None = None
) -> list[MemoryRow]:
    """An engine process, at `max_running_requests` sequences of full context.

    `static`: bytes that it reserves of its GPU for weights, state and KV cache; None when the GPU is not known. With
    it the KV cache is what the others leave, at least one request of full context.
    """
    requests, context = recipe.rollout.running, recipe.rollout.context_length
    weights = 2 * shape.parameters
    if device == "cpu":
        rows = [
            MemoryRow(name, "weights (fp32)", "host", 2 * weights),
            MemoryRow(name, "weights (published dtype)", "host", weights),
            MemoryRow(name, "KV cache (fp32)", "host", 2 * shape.kv_bytes_per_token * requests * context, fixed=False),
        ]
        if shape.state_bytes_per_sequence:
            state = shape.state_bytes_per_sequence * requests
            rows.append(MemoryRow(name, "recurrent state", "host", state, fixed=False))
        return [*rows, MemoryRow(name, "process", "host", TORCH_PROCESS, "estimated")]
    one, most = shape.kv_bytes_per_token * context, shape.kv_bytes_per_token * context * requests
    pool = most if static is None else min(most, max(one, static - static_bytes(shape, recipe, requests=0)))
    rows = [
        MemoryRow(name, "weights (bf16)", "gpu", weights),
        MemoryRow(name, "KV cache (bf16), one request", "gpu", one),
        MemoryRow(name, "KV cache (bf16), the others", "gpu", pool - one, fixed=static is not None),
    ]
    if shape.state_bytes_per_sequence:
        # sglang holds one slot more than it serves; one a request, because the radix cache is off
        rows.append(MemoryRow(name, "recurrent state", "gpu", shape.state_bytes_per_sequence * (requests + 1)))
    rows += [
        MemoryRow(name, "activations of a prefill chunk", "gpu", _prefill(shape, recipe), "estimated"),
        MemoryRow(name, "logits of a decode batch", "gpu", _sampling(shape, recipe), "estimated"),
        MemoryRow(name, "CUDA graphs", "gpu", CUDA_GRAPHS, "estimated"),
        MemoryRow(name, "CUDA context", "gpu", CUDA_CONTEXT, "estimated"),
        MemoryRow(name, "staged weights", "host", weights, "estimated", fixed=False),
        MemoryRow(name, "staged changes", "gpu", int(STAGED_BYTES * shape.parameters), "estimated", fixed=False),
    ]
    return [*rows, MemoryRow(name, "process", "host", TORCH_PROCESS, "estimated")]


def static_bytes(shape: MemoryShape, recipe: Recipe, *, requests: int = 1) -> int:
    """What an engine must reserve on a GPU: weights, every state slot, and the KV cache of `requests` full contexts."""
    slots = recipe.rollout.running + 1
    kv = shape.kv_bytes_per_token * recipe.rollout.context_length
    return 2 * shape.parameters + slots * shape.state_bytes_per_sequence + requests * kv


def beside_static(shape: MemoryShape, recipe: Recipe) -> int:
    """What an engine takes of a GPU besides what it reserves."""
    return _prefill(shape, recipe) + _sampling(shape, recipe) + CUDA_GRAPHS + CUDA_CONTEXT


def _prefill(shape: MemoryShape, recipe: Recipe) -> int:
    """Without gradients about half of what autograd would keep of one block lives at once."""
    chunk = min(recipe.rollout.chunked_prefill_size, recipe.rollout.running * recipe.rollout.context_length)
    return chunk * max(block_activations(shape)) // 2


def _sampling(shape: MemoryShape, recipe: Recipe) -> int:
    return SAMPLING_BUFFERS * 4 * shape.vocab_size * recipe.rollout.running


def block_activations(shape: MemoryShape) -> tuple[int, ...]:
    """Bytes a token that autograd keeps of each block in bf16, as the adapter says; else from the hidden size."""
    return shape.block_activations or (ACTIVATION_UNITS * shape.hidden_size,) * shape.layers


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


def safe(estimated: int) -> int:
    """Bytes to reckon with where so many are estimated."""
    return estimated + int(MARGIN * estimated)


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
    by_process = [sum(row.bytes for row in there if row.away and row.process == name) for name in processes]
    return sum(row.bytes for row in there if not row.away) + max(by_process, default=0)


def words(count: int) -> str:
    """Bytes for people: `7.83 GiB`, `34.0 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
