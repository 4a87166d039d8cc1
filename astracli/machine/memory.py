"""What processes hold in memory and on disk: one row for each component, in bytes.

`counted` rows follow from sizes, `estimated` ones have a factor that depends on code or data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Place = Literal["gpu", "host", "disk"]
Basis = Literal["counted", "estimated"]

TORCH_PROCESS = 340 * 2**20
"""A process that has imported torch and transformers (measured)."""
CUDA_CONTEXT = 2**30
"""Context, kernels, cuBLAS workspaces and rounding of the allocator, for each process and GPU (estimated)."""
MARGIN = 0.5
"""Memory that a plan leaves free on a GPU, as a share of the estimated rows there. In the runs of docs/benchmarks.md,
all on one kind of GPU, no peak exceeded its plan by more than a fifth of these rows."""


class Component(Enum):
    """What a row counts. Code compares members; their values are texts for people (see `plan/view.py`)."""

    PROCESS = "process"
    CUDA_CONTEXT = "CUDA context"
    # an engine
    WEIGHTS = "weights (bf16)"
    WEIGHTS_FP32 = "weights (fp32)"
    WEIGHTS_AS_PUBLISHED = "weights (published dtype)"
    KV_CACHE_FP32 = "KV cache (fp32)"
    KV_CACHE_OF_ONE = "KV cache (bf16), one request"
    KV_CACHE_OF_OTHERS = "KV cache (bf16), the others"
    RECURRENT_STATE = "recurrent state"
    PREFILL = "activations of a prefill chunk"
    DECODE_LOGITS = "logits of a decode batch"
    CUDA_GRAPHS = "CUDA graphs"
    STAGED_WEIGHTS = "staged weights"
    STAGED_CHANGES = "staged changes"
    FULL_VERSION = "a full version before its pause"
    # a trainer
    MASTERS = "master weights (fp32)"
    OTHERS_WEIGHTS = "weights that other ranks update (bf16)"
    GRADIENTS = "gradients (fp32)"
    MOMENTS = "moments (fp32)"
    REFERENCE = "reference (bf16)"
    REFERENCE_FP32 = "reference"
    TEACHER = "teacher (bf16)"
    TEACHER_FP32 = "teacher (fp32)"
    FROZEN_WEIGHTS = "frozen weights, adapters merged (bf16)"
    FROZEN_WEIGHTS_FP32 = "frozen weights, adapters merged (fp32)"
    BASE = "adapted matrices without their adapters (bf16)"
    ADAPTERS = "adapters and their gradients (fp32)"
    GATHERED = "embedding and head, gathered (bf16)"
    GATHERED_WHOLE = "weights, gathered for a minibatch (bf16)"
    ROUNDED_WEIGHTS = "rounded weights of the forward (fp32)"
    ACTIVATIONS = "activations"
    PROMPT_STATES = "recurrent states from which samples of a shared prompt begin (fp32)"
    BACKWARD = "backward pass of the head or a block"
    LOGITS = "logits of a chunk (fp32)"
    PUBLISHED = "published weights, last version and the next"
    FIRST_PUBLISHED = "published weights, the first version"
    FULL_PUBLISHED = "published weights, a version in full"
    CACHE_HOLES = "holes of torch's cache"
    """Part of the peak; torch releases them where memory is short."""
    LOADING = "checkpoint while loading (fp32), over these"
    CHECKPOINT_COPY = "copy of a checkpoint that is being written"
    # on disk
    CHECKPOINTS = "{} checkpoints (one being written)"
    FULL_VERSIONS = "{} published versions, full"
    VERSIONS = "{} published versions, {} of them full"
    EXPORT = "export"


@dataclass(frozen=True)
class MemoryRow:
    process: str
    component: Component
    where: Place
    bytes: int
    basis: Basis = "counted"
    fixed: bool = True
    """Needed from the start. False when it grows with load and the process also works with less."""
    away: bool = False
    """Released while another process uses the GPU (time sharing)."""
    offloaded: bool = False
    """Host memory for what was released from the GPU."""
    counts: tuple[int, ...] = ()
    """Filled into the value of the component."""
    host: str | None = None
    """Of a process on another host: its name; None: the first host."""


def safe(estimated: int) -> int:
    """Estimated bytes plus their margin."""
    return estimated + int(MARGIN * estimated)


def speed(rate: float) -> str:
    """Bytes/s for people: `1.2 GB/s`, `850 kB/s`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}/s"
    return f"{rate / 1e3:.3g} kB/s"


def words(count: int) -> str:
    """Bytes for people: `7.83 GiB`, `34.0 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
