"""The parts of what processes hold in memory and on disk. Which part a row is decides what becomes of it."""

from __future__ import annotations

from enum import Enum


class Component(Enum):
    """The value is what people read (`plan/view.py`), with blanks for a row's counts; nothing is decided by it."""

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
    GRADIENTS = "gradients (fp32)"
    MOMENTS = "moments (fp32)"
    REFERENCE = "reference (bf16)"
    REFERENCE_FP32 = "reference"
    GATHERED = "embedding and head, gathered (bf16)"
    ROUNDED_WEIGHTS = "rounded weights of the forward (fp32)"
    ACTIVATIONS = "activations"
    BACKWARD = "backward pass of the head or a block"
    LOGITS = "logits of a chunk (fp32)"
    PUBLISHED = "published weights, last version and the next"
    FIRST_PUBLISHED = "published weights, the first version"
    CACHE_HOLES = "holes of torch's cache"
    """There at the fullest moment; torch gives them back where memory is short."""
    LOADING = "checkpoint while loading (fp32), over these"
    CHECKPOINT_COPY = "copy of a checkpoint that is being written"
    # on disk
    CHECKPOINTS = "{} checkpoints (one being written)"
    FULL_VERSIONS = "{} published versions, full"
    VERSIONS = "{} published versions, {} of them full"
    EXPORT = "export"
