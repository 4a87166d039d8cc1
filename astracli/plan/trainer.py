"""What a trainer rank holds in memory, in bytes, at its largest: in the backward pass of a full micro-batch. Pure.

The terms follow `training/`: fp32 masters, gradients and moments, sharded over the ranks (optimizer.py); on one rank
the bf16 parameters are parts of their masters (split_masters.py); on several FSDP2 mixed precision gathers a block in
bf16 around its use and the embedding and head for the whole pass (fsdp.py); the output head in chunks of tokens
(logprob.py); the last published version and the next, on the GPU where there is room for both (publish/snapshot.py),
else on the host.
Letters: P parameters, R ranks, V vocabulary, D hidden size, T tokens of a micro-batch.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from astracli.config.recipe import RECOMPUTED_BLOCKS, Recipe, Recomputed
from astracli.machine.component import Component
from astracli.machine.memory import CUDA_CONTEXT, TORCH_PROCESS, Basis, MemoryRow, Place
from astracli.models.adapter import MemoryShape
from astracli.process.layout import BUCKET_BYTES, BUCKETS_IN_FLIGHT, LOGIT_BYTES, RESIDENT, Split, Where, recomputed

GATHERED = 14
"""Bytes a parameter of a block while its backward pass runs: it and the next one gathered in bf16 (2 each) with the
buffer of the collective (2), bf16 gradients (2), the fp32 buffer that they are reduced from (4), the one of the block
before (2: half of it, on average)."""
ALONE = 2
"""The same on one rank, which gathers and reduces nothing: bf16 gradients, each gone when it is added up."""
RECOMPUTED = 1.25
"""A block's backward pass over what autograd kept of it: gradients come before what they are made from goes."""
HOLES_SHARE = 0.03
"""Of what torch allocates on a GPU, what its cache holds besides at the fullest moment (measured: 0.025 to 0.041)."""
SPARE_BYTES = 2**30
"""Of a GPU, what published versions leave free; `weights.snapshot` says the same."""
NCCL = 2**29
"""Buffers of the collectives on each GPU (estimated)."""


def trainer_rows(
    name: str,
    shape: MemoryShape,
    recipe: Recipe,
    device: str,
    ranks: int,
    split: Split = RESIDENT,
    published: Where = "host",
) -> list[MemoryRow]:
    """One trainer rank; parameters, gradients, moments and reference are sharded over the ranks. `published`: where the
    last published version and the next lie."""
    if device == "cpu":
        return _on_cpu(name, shape, recipe, ranks)
    share = ceil(shape.parameters / ranks)
    rows = [
        MemoryRow(name, Component.MASTERS, "gpu", 4 * share),
        MemoryRow(name, Component.GRADIENTS, "gpu", 4 * share),
    ]
    away = ceil(split.moments_on_host * 8 * share)
    places: tuple[tuple[Where, int], ...] = (("gpu", 8 * share - away), ("host", away))
    rows += [MemoryRow(name, Component.MOMENTS, where, part) for where, part in places if part]
    if recipe.algorithm.kl_coef > 0:
        # moved in for the scoring pass, it takes the room of the gradients, which are made later
        rows.append(MemoryRow(name, Component.REFERENCE, split.reference, 2 * share))
    if ranks > 1:
        rows.append(MemoryRow(name, Component.GATHERED, "gpu", 2 * _outside(shape)))
    # what an adapter says of its blocks is counted from autograd
    kept, peak = _passes(shape, recipe, ranks, split)
    known: Basis = "counted" if shape.block_activations else "estimated"
    rows += [
        MemoryRow(name, Component.ACTIVATIONS, "gpu", kept, known),
        MemoryRow(name, Component.BACKWARD, "gpu", peak, "estimated"),
    ]
    if published == "gpu":
        # what finds no room at a version's time comes to the host; the first one, before anything was trained, does so
        rows.append(MemoryRow(name, Component.PUBLISHED, "gpu", 4 * share, fixed=False))
        rows.append(MemoryRow(name, Component.FIRST_PUBLISHED, "host", 2 * share))
    else:
        rows.append(MemoryRow(name, Component.PUBLISHED, "host", 4 * share))
    holes = int(HOLES_SHARE * sum(row.bytes for row in rows if row.where == "gpu"))
    rows.append(MemoryRow(name, Component.CACHE_HOLES, "gpu", holes, "estimated", fixed=False))
    rows.append(MemoryRow(name, Component.CUDA_CONTEXT, "gpu", context_bytes(ranks), "estimated"))
    resident = sum(row.bytes for row in rows if row.where == "host")
    loading = max(0, 4 * shape.parameters - resident)
    rows.append(MemoryRow(name, Component.LOADING, "host", loading, "estimated"))
    rows += _checkpoint_copy(name, recipe, share)
    return [*rows, MemoryRow(name, Component.PROCESS, "host", TORCH_PROCESS, "estimated")]


def context_bytes(ranks: int) -> int:
    """What a rank keeps of its GPU while another process uses it."""
    return CUDA_CONTEXT + (NCCL if ranks > 1 else 0)


def _on_cpu(name: str, shape: MemoryShape, recipe: Recipe, ranks: int) -> list[MemoryRow]:
    share = ceil(shape.parameters / ranks)
    host: Place = "host"
    rows = [
        MemoryRow(name, Component.MASTERS, host, 4 * share),
        MemoryRow(name, Component.MOMENTS, host, 8 * share),
        MemoryRow(name, Component.GRADIENTS, host, 4 * share),
        MemoryRow(name, Component.PUBLISHED, host, 4 * share),
        MemoryRow(name, Component.ROUNDED_WEIGHTS, host, 4 * share),
    ]
    if recipe.algorithm.kl_coef > 0:
        rows.append(MemoryRow(name, Component.REFERENCE_FP32, host, 4 * share))
    logits = min(LOGIT_BYTES["cpu"], _tokens(recipe) * shape.vocab_size * 4)
    rows.append(MemoryRow(name, Component.LOGITS, host, 3 * logits))
    activations = 2 * _tokens(recipe) * sum(_of_a_token(shape, recomputed(recipe, RESIDENT)))
    rows.append(MemoryRow(name, Component.ACTIVATIONS, host, activations, "estimated", fixed=False))
    rows += _checkpoint_copy(name, recipe, share)
    return [*rows, MemoryRow(name, Component.PROCESS, host, TORCH_PROCESS, "estimated")]


def _checkpoint_copy(name: str, recipe: Recipe, share: int) -> list[MemoryRow]:
    """What a checkpoint is written from beside the next steps (checkpoint_saver.py): masters and both moments. With
    less, its pieces are used again, and an update waits for the disk."""
    if not recipe.checkpoint.every or recipe.launch.deterministic:
        return []
    return [MemoryRow(name, Component.CHECKPOINT_COPY, "host", 12 * share, fixed=False)]


def _outside(shape: MemoryShape) -> int:
    return shape.outside_blocks or shape.vocab_size * shape.hidden_size


def _tokens(recipe: Recipe) -> int:
    """Most tokens of a micro-batch: its budget, or one row that is longer, and no more than a minibatch holds."""
    context = recipe.rollout.context_length
    step = ceil(recipe.batch_sequences / recipe.train.minibatches) * context
    return min(max(recipe.train.tokens_per_microbatch, context), step)


@lru_cache  # a plan that looks for a way out weighs some thousand splits
def _of_a_token(shape: MemoryShape, mode: Recomputed) -> tuple[int, int]:
    """(what forward keeps of a token in bf16: of a recomputed block its input, of the others all; the most of a
    block)."""
    own = shape.kept_of_blocks
    again = set(range(0, len(own), RECOMPUTED_BLOCKS[mode])) if mode != "none" else set()
    return sum(2 * shape.hidden_size if i in again else size for i, size in enumerate(own)), max(own)


def _passes(shape: MemoryShape, recipe: Recipe, ranks: int, split: Split) -> tuple[int, int]:
    """(activations of a micro-batch, the largest of what comes and goes while they are kept, or after them: head, one
    block, update).

    Head: its gradient in fp32 and bf16, a chunk of fp32 logits and the bf16 gradients of four, the last norm. Block:
    `GATHERED` or `ALONE`, its activations made again, the head's gradient. On one rank products add to the fp32
    gradients themselves (weight_gradients.py): the head's gradient lies nowhere else, and a block's only where
    something else computes it.
    """
    tokens, head, mode = _tokens(recipe), shape.vocab_size * shape.hidden_size, recomputed(recipe, split)
    kept, largest = (tokens * size for size in _of_a_token(shape, mode))
    logits = min(LOGIT_BYTES["cuda"], tokens * shape.vocab_size * 4)
    of_head = 1 if ranks > 1 else 0
    in_head = of_head * (4 + 2) * head + 3 * logits + 14 * shape.hidden_size * tokens
    block = ceil((shape.parameters - _outside(shape)) / max(shape.layers, 1))
    again = RECOMPUTED if mode != "none" else RECOMPUTED - 1
    weights = (GATHERED if ranks > 1 else ALONE) * block
    in_block = weights + int(again * largest) + of_head * 2 * head
    return kept, max(in_head, in_block, _in_update(shape, ranks, split) - kept)


def _in_update(shape: MemoryShape, ranks: int, split: Split) -> int:
    """What an update brings to the GPU (adam.py): on one rank masters made whole, the head's in one piece, beside the
    first moments from the host; then those of `BUCKETS_IN_FLIGHT` buckets. The head's moments are the last to leave."""
    share, head = ceil(shape.parameters / ranks), ceil(shape.vocab_size * shape.hidden_size / ranks)
    master = 4 if ranks == 1 else 0
    whole = min(master * share, max(BUCKET_BYTES, master * head))
    if not split.moments_on_host:
        return whole
    head_stays = (1.0 - split.moments_on_host) * share >= ceil(_outside(shape) / ranks)  # and an untied embedding
    largest = BUCKET_BYTES if head_stays else max(BUCKET_BYTES, (8 + master) * head)
    before, between = (
        (BUCKETS_IN_FLIGHT - 1) * BUCKET_BYTES + piece for piece in (whole if head_stays else 0, largest)
    )
    return min(max(before, between), (8 + master) * share)
