"""What a run will hold in memory and on disk, in bytes, counted from the model's sizes and the recipe. Pure arithmetic.

`counted` rows follow from the sizes; `estimated` ones carry a factor that depends on code or data.
Letters: P parameters, R trainer ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from astracli.adapter import MemoryShape
from astracli.recipe import Recipe

Place = Literal["gpu", "host", "disk"]
Basis = Literal["counted", "estimated"]

TORCH_PROCESS = 340 * 2**20
"""A process that has imported torch and transformers (measured)."""
LIGHT_PROCESS = 150 * 2**20
"""A process with a tokenizer and an HTTP client."""
LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""fp32 logits of one chunk in the trainer's loss; three such buffers live at once."""
ACTIVATION_BYTES = 34
"""Per token, layer and hidden unit in bf16, without recomputation: arXiv 2205.05198, no attention scores kept."""
DELTA_SHARE = 0.15
"""A delta payload over a full one, at most: what a high learning rate gives; 4B at 5e-6 gives about 0.04."""

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


def engine_rows(name: str, shape: MemoryShape, recipe: Recipe, device: str) -> list[MemoryRow]:
    """An engine process, at `max_running_requests` sequences of full context."""
    requests, context = recipe.rollout.max_running_requests, recipe.rollout.context_length
    weights = 2 * shape.parameters
    if device == "cpu":
        rows = [
            MemoryRow(name, "weights (fp32)", "host", 2 * weights),
            MemoryRow(name, "weights (published dtype)", "host", weights),
            MemoryRow(name, "KV cache (fp32)", "host", 2 * shape.kv_bytes_per_token * requests * context, fixed=False),
        ]
        place: Place = "host"
    else:
        prefill = min(recipe.rollout.chunked_prefill_size, requests * context)
        rows = [
            MemoryRow(name, "weights (bf16)", "gpu", weights),
            MemoryRow(name, "KV cache (bf16)", "gpu", shape.kv_bytes_per_token * requests * context, fixed=False),
            MemoryRow(name, "logits of a prefill chunk (fp32)", "gpu", prefill * shape.vocab_size * 4, fixed=False),
            MemoryRow(name, "staged weights", "host", weights, "estimated", fixed=False),
            MemoryRow(name, "staged changes", "gpu", int(STAGED_BYTES * shape.parameters), "estimated", fixed=False),
        ]
        place = "gpu"
    if shape.state_bytes_per_sequence:
        state = shape.state_bytes_per_sequence * requests
        rows.append(MemoryRow(name, "recurrent state", place, state, fixed=False))
    return [*rows, MemoryRow(name, "process", "host", TORCH_PROCESS, "estimated")]


def trainer_rows(name: str, shape: MemoryShape, recipe: Recipe, device: str, rank: int, ranks: int) -> list[MemoryRow]:
    """One trainer rank; parameters, gradients and moments are sharded over the ranks."""
    place: Place = "gpu" if device == "cuda" else "host"
    share = ceil(shape.parameters / ranks)
    compute = 2 if device == "cuda" else 4
    rows = [
        MemoryRow(name, "master weights (fp32)", place, 4 * share),
        MemoryRow(name, "moments (fp32)", place, 8 * share),
        MemoryRow(name, "gradients (fp32)", place, 4 * share),
        MemoryRow(name, "weights as published, last version", "host", 2 * share),
    ]
    if device == "cuda":
        rows.append(MemoryRow(name, "weights as published, if there is room", "gpu", 4 * share, fixed=False))
        block = 2 * 2 * ceil(shape.parameters / max(shape.layers, 1))
        rows.append(MemoryRow(name, "gathered blocks (bf16)", "gpu", block, "estimated"))
    else:
        rows.append(MemoryRow(name, "rounded weights of the forward (fp32)", "host", 4 * share))
    if recipe.algorithm.kl_coef > 0:
        rows.append(MemoryRow(name, "reference", place, compute * share))
    if rank == 0 and device == "cuda":
        rows.append(MemoryRow(name, "checkpoint while loading (fp32)", "host", 4 * shape.parameters, "estimated"))
    logits = min(LOGIT_BYTES[device], recipe.train.tokens_per_microbatch * shape.vocab_size * 4)
    rows.append(MemoryRow(name, "logits of a chunk (fp32)", place, 3 * logits))
    activations = _activations(shape, recipe, compute)
    rows.append(MemoryRow(name, "activations", place, activations, "estimated", fixed=False))
    return [*rows, MemoryRow(name, "process", "host", TORCH_PROCESS, "estimated")]


def _activations(shape: MemoryShape, recipe: Recipe, element: int) -> int:
    """Of one micro-batch; `full` recomputation keeps the input of each layer and one whole layer."""
    tokens = min(recipe.train.tokens_per_microbatch, _step_tokens(recipe))
    unit = tokens * shape.hidden_size
    layer = unit * ACTIVATION_BYTES * element // 2
    kept = {"none": layer, "selective": layer // 2, "full": unit * element}[recipe.train.activation_checkpointing]
    return kept * shape.layers + layer


def _step_tokens(recipe: Recipe) -> int:
    """Most tokens that one minibatch can hold."""
    return ceil(recipe.batch_sequences / recipe.train.minibatches) * recipe.rollout.context_length


def light_row(name: str, workers: int = 0) -> MemoryRow:
    """A process without a model, and the grading workers that it starts."""
    return MemoryRow(name, "process", "host", LIGHT_PROCESS * (1 + workers), "estimated")


def disk_rows(shape: MemoryShape, recipe: Recipe, checkpoint_bytes: int | None) -> list[MemoryRow]:
    """Checkpoints, published versions and the export of a training run, at their largest."""
    weights, keep = 2 * shape.parameters, recipe.weights.keep
    held = recipe.checkpoint.keep + 1
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


def total(
    rows: Sequence[MemoryRow], *, where: Place, processes: Sequence[str] | None = None, fixed: bool = False
) -> int:
    """Sum in bytes of the rows of one place, of some processes, and of what is fixed only."""
    return sum(
        row.bytes
        for row in rows
        if row.where == where and (processes is None or row.process in processes) and (row.fixed or not fixed)
    )


def words(count: int) -> str:
    """Bytes for people: `7.83 GiB`, `34.0 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
