"""What a trainer rank holds in memory, in bytes, at its largest: in the backward pass of a full micro-batch. Pure.

The terms follow `training/`. Master weights and moments are fp32, and divided among the ranks (optimizer.py); gradients
are fp32. On one rank the bf16 parameters are the upper parts of split master weights (split_masters.py), and so they
are where several ranks divide only the optimizer: there each rank also holds the weights that the others update, and
all gradients (sharded_optimizer.py). Otherwise FSDP2 gathers a block in bf16 around its use or for a minibatch, and the
embedding and head for the whole pass; it holds gradients of its shards, or whole until a minibatch ends (fsdp.py). The
output head runs in
chunks of tokens (logprob.py). The last published version and the next lie on the GPU where there is room for both
(publish/snapshot.py), else on the host.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from astracli.config.recipe_train import RECOMPUTED_BLOCKS, Recomputed
from astracli.machine.memory import CUDA_CONTEXT, TORCH_PROCESS, Basis, Component, MemoryRow
from astracli.models.adapter import MemoryShape
from astracli.plan.cost import TYPICAL, TrainerLoad
from astracli.process.layout import (
    BUCKET_BYTES,
    BUCKETS_IN_FLIGHT,
    LOGIT_BYTES,
    MERGED_TOGETHER,
    RESIDENT,
    Split,
    Where,
    recomputed,
)

GATHERED = 14
"""Bytes a parameter of a block while its backward pass runs: it and the next block gathered in bf16 (2 each), the
buffer of the collective (2), bf16 gradients (2), the fp32 buffer that they are reduced from (4), and that of the block
before (2: half of it, on average)."""
ALONE = 2
"""The same on a rank that gathers and reduces nothing: bf16 gradients, each freed when it is added up."""
FROZEN_GATHERED = 6
"""`GATHERED` without gradients."""
MERGING = 12
"""Bytes of an element that an adapter is merged into: the sum, a product, and the matrix in fp32."""
RECOMPUTED = 1.25
"""A block's backward pass over what autograd kept of it: gradients exist before their inputs are freed."""
HOLES_SHARE = 0.03
"""Holes in torch's cache at the fullest moment, over what torch allocates on a GPU (measured: 0.025 to 0.041)."""
SPARE_BYTES = 2**30
"""What published versions leave free on a GPU; `weights.snapshot` says the same."""
NCCL = 2**29
"""Buffers of the collectives on each GPU (estimated)."""


def trainer_rows(
    name: str, load: TrainerLoad, device: str, split: Split = RESIDENT, published: Where = "host"
) -> list[MemoryRow]:
    """One trainer rank. `published`: where the last published version and the next lie."""
    if device == "cpu":
        return _on_cpu(name, load, split)
    shape, ranks = load.shape, load.ranks
    parts = load.parts(split)
    share = ceil(shape.parameters / parts)
    rows = _adapters(name, load, split) if shape.adapters else _whole(name, load, split)
    if shape.teacher:
        rows.append(MemoryRow(name, Component.TEACHER, "gpu", 2 * ceil(shape.teacher / parts)))
    if ranks > 1 and split.sharding == "gradients":
        rows.append(MemoryRow(name, Component.GATHERED_WHOLE, "gpu", 2 * shape.parameters))
    elif wrapped(load, split):
        rows.append(MemoryRow(name, Component.GATHERED, "gpu", 2 * _outside(shape)))
    kept, peak = _passes(load, split)
    known: Basis = "counted" if shape.block_activations else "estimated"  # an adapter counts them from autograd
    rows += [
        MemoryRow(name, Component.ACTIVATIONS, "gpu", kept, known),
        *_prompt_states(name, load, "gpu", recomputed(load.recipe, split)),
        MemoryRow(name, Component.BACKWARD, "gpu", peak, "estimated"),
    ]
    if load.recipe.weights.transfer == "adapter":  # the first version and others in full, straight to the host
        rows.append(MemoryRow(name, Component.FULL_PUBLISHED, "host", 2 * share))
    elif published == "gpu":
        # a version that finds no room comes to the host; so does the first one, before any training
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
    return [*rows, *_checkpoint_copy_and_process(name, load, split)]


def wrapped(load: TrainerLoad, split: Split) -> bool:
    """Whether FSDP2 shards the policy."""
    return load.ranks > 1 and split.sharding != "optimizer"


def _of_gradients(load: TrainerLoad, split: Split) -> int:
    """How many gradients a rank holds."""
    whole = split.sharding in ("optimizer", "parameters")
    return load.shape.parameters if whole else ceil(load.shape.parameters / load.parts(split))


def _whole(name: str, load: TrainerLoad, split: Split) -> list[MemoryRow]:
    """What is trained, and what belongs to it, when all weights are."""
    share = ceil(load.shape.parameters / load.parts(split))
    rows = [
        MemoryRow(name, Component.MASTERS, "gpu", 4 * share),
        MemoryRow(name, Component.GRADIENTS, "gpu", 4 * _of_gradients(load, split)),
        *_moments(name, share, split),
    ]
    if load.ranks > 1 and split.sharding == "optimizer":
        rows.append(MemoryRow(name, Component.OTHERS_WEIGHTS, "gpu", 2 * (load.shape.parameters - share)))
    if load.scores_reference:
        # moved in for the scoring pass, it uses the room of the gradients, which are computed later
        rows.append(MemoryRow(name, Component.REFERENCE, split.reference, load.reference_bytes(split)))
    return rows


def _adapters(name: str, load: TrainerLoad, split: Split) -> list[MemoryRow]:
    """The same with adapters (training/lora.py): the model's weights are frozen, in bf16, and matrices with an adapter
    are there twice. Every rank holds all adapters: parameters, masters and gradients."""
    shape = load.shape
    return [
        MemoryRow(name, Component.FROZEN_WEIGHTS, "gpu", 2 * ceil(shape.parameters / load.ranks)),
        MemoryRow(name, Component.BASE, split.reference, load.reference_bytes(split)),
        MemoryRow(name, Component.ADAPTERS, "gpu", 12 * shape.adapters),
        *_moments(name, shape.adapters, split),
    ]


def _moments(name: str, count: int, split: Split) -> list[MemoryRow]:
    """Of so many parameters."""
    away = ceil(split.moments_on_host * 8 * count)
    places: tuple[tuple[Where, int], ...] = (("gpu", 8 * count - away), ("host", away))
    return [MemoryRow(name, Component.MOMENTS, where, part) for where, part in places if part]


def context_bytes(ranks: int) -> int:
    """What a rank keeps of its GPU while another process uses it."""
    return CUDA_CONTEXT + (NCCL if ranks > 1 else 0)


def _on_cpu(name: str, load: TrainerLoad, split: Split) -> list[MemoryRow]:
    shape, tokens = load.shape, _tokens(load)
    share = ceil(shape.parameters / load.ranks)
    logits = min(LOGIT_BYTES["cpu"], tokens * shape.vocab_size * 4)
    activations = 2 * tokens * sum(_of_a_token(shape, recomputed(load.recipe, RESIDENT)))
    sizes = {
        Component.MASTERS: 4 * share,
        Component.MOMENTS: 8 * share,
        Component.GRADIENTS: 4 * _of_gradients(load, split),
        Component.PUBLISHED: 4 * share,
        Component.ROUNDED_WEIGHTS: 4 * (share if wrapped(load, split) else shape.parameters),
        **({Component.REFERENCE_FP32: 4 * share} if load.scores_reference else {}),
        Component.LOGITS: 3 * logits,
    }
    if shape.adapters:
        sizes = {
            Component.FROZEN_WEIGHTS_FP32: 4 * share,
            Component.BASE: load.reference_bytes(split),
            Component.ADAPTERS: 12 * shape.adapters,
            Component.MOMENTS: 8 * shape.adapters,
            Component.PUBLISHED: 4 * share,
            Component.LOGITS: 3 * logits,
        }
    if shape.teacher:
        sizes[Component.TEACHER_FP32] = 4 * ceil(shape.teacher / load.ranks)
    return [
        *(MemoryRow(name, component, "host", size) for component, size in sizes.items()),
        MemoryRow(name, Component.ACTIVATIONS, "host", activations, "estimated", fixed=False),
        *_prompt_states(name, load, "host", recomputed(load.recipe, RESIDENT)),
        *_checkpoint_copy_and_process(name, load, split),
    ]


def _checkpoint_copy_and_process(name: str, load: TrainerLoad, split: Split) -> list[MemoryRow]:
    """On any device: the copy that a checkpoint is written from during the next steps (checkpoint_saver.py: master
    weights and both moments; with less room its pieces are reused, and an update waits for the disk), and torch."""
    process = MemoryRow(name, Component.PROCESS, "host", TORCH_PROCESS, "estimated")
    if not load.recipe.checkpoint.every or load.recipe.launch.deterministic:
        return [process]
    size = 12 * (load.shape.adapters or ceil(load.shape.parameters / load.parts(split)))
    return [MemoryRow(name, Component.CHECKPOINT_COPY, "host", size, fixed=False), process]


def _outside(shape: MemoryShape) -> int:
    return shape.outside_blocks or shape.vocab_size * shape.hidden_size


def _tokens(load: TrainerLoad) -> int:
    """Most tokens of a micro-batch: its budget, or one row that is longer, and no more than a minibatch holds."""
    context, train = load.recipe.rollout.context_length, load.recipe.train
    step = ceil(load.recipe.batch_sequences / train.minibatches) * context
    return min(max(train.tokens_per_microbatch, context), step)


def _prompt_states(name: str, load: TrainerLoad, where: Where, mode: Recomputed) -> list[MemoryRow]:
    """Where prompts are shared, autograd keeps the state with which each sample of a micro-batch begins in every
    recurrent layer that is not computed again (of those that are, one at a time)."""
    state, recipe = load.shape.state_bytes_per_sequence, load.recipe
    if not state or recipe.sft is not None or recipe.train.share_prompts is False or recipe.rollout.group_size == 1:
        return []
    samples = min(ceil(_tokens(load) / (TYPICAL * recipe.rollout.context_length)), recipe.batch_sequences)
    kept = {"none": 1.0, "selective": 0.5, "full": 1.0 / max(load.shape.layers, 1)}[mode]
    size = ceil(samples * state * kept)
    return [MemoryRow(name, Component.PROMPT_STATES, where, size, "estimated", fixed=where == "gpu")]


@lru_cache  # a plan that looks for settings that fit tries some thousand splits
def _of_a_token(shape: MemoryShape, mode: Recomputed) -> tuple[int, int]:
    """(bytes that the forward pass keeps of a token in bf16: of a recomputed block its input, of the others all; the
    most of a block)."""
    own = shape.kept_of_blocks
    again = set(range(0, len(own), RECOMPUTED_BLOCKS[mode])) if mode != "none" else set()
    return sum(2 * shape.hidden_size if i in again else size for i, size in enumerate(own)), max(own)


def _passes(load: TrainerLoad, split: Split) -> tuple[int, int]:
    """(activations of a micro-batch, the largest temporary need while they are kept or after them: head, one block or
    update).

    Head: its gradient in fp32 and bf16, a chunk of fp32 logits and the bf16 gradients of four, the last norm. Block:
    `GATHERED` or `ALONE`, its recomputed activations, the head's gradient. Without FSDP2, products are added to the
    fp32 gradients themselves (weight_gradients.py), so the head's gradient needs no other memory, and a block's only
    where something else computes it.
    """
    shape, several = load.shape, wrapped(load, split)
    tokens, head, mode = _tokens(load), shape.vocab_size * shape.hidden_size, recomputed(load.recipe, split)
    kept, largest = (tokens * size for size in _of_a_token(shape, mode))
    logits = min(LOGIT_BYTES["cuda"], tokens * shape.vocab_size * 4)
    if shape.adapters:
        return kept, _peak_with_adapters(load, logits, kept, largest, again=mode != "none")
    in_head = several * (4 + 2) * head + 3 * logits + 14 * shape.hidden_size * tokens
    block = ceil((shape.parameters - _outside(shape)) / max(shape.layers, 1))
    again = RECOMPUTED if mode != "none" else RECOMPUTED - 1
    in_block = (GATHERED if several else ALONE) * block + int(again * largest) + several * 2 * head
    return kept, max(in_head, in_block, in_update(shape, load.parts(split), split) - kept)


def _peak_with_adapters(load: TrainerLoad, logits: int, kept: int, largest: int, *, again: bool) -> int:
    """The largest temporary need when the weights are frozen: their gradients are not computed, so a block's backward
    pass holds its activations, and on several ranks what is gathered of it; an update merges adapters."""
    shape = load.shape
    in_head = 3 * logits + 14 * shape.hidden_size * _tokens(load)
    block = ceil((shape.parameters - _outside(shape)) / max(shape.layers, 1))
    in_block = (FROZEN_GATHERED * block if load.ranks > 1 else 0) + int((RECOMPUTED - (not again)) * largest)
    return max(in_head, in_block, MERGING * MERGED_TOGETHER - kept)


def in_update(shape: MemoryShape, ranks: int, split: Split) -> int:
    """What an update brings to the GPU (adam.py). Without FSDP2: whole master weights (the head's in one piece) beside
    the first moments from the host. Then the moments of `BUCKETS_IN_FLIGHT` buckets; the head's leave last."""
    share, head = ceil(shape.parameters / ranks), ceil(shape.vocab_size * shape.hidden_size / ranks)
    master = 4 if ranks == 1 or split.sharding == "optimizer" else 0
    whole = min(master * share, max(BUCKET_BYTES, master * head))
    if not split.moments_on_host:
        return whole
    head_stays = (1.0 - split.moments_on_host) * share >= ceil(_outside(shape) / ranks)  # and an untied embedding
    largest = BUCKET_BYTES if head_stays else max(BUCKET_BYTES, (8 + master) * head)
    before, between = (
        (BUCKETS_IN_FLIGHT - 1) * BUCKET_BYTES + piece for piece in (whole if head_stays else 0, largest)
    )
    return min(max(before, between), (8 + master) * share)
