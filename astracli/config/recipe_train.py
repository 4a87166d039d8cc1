"""The tables of a recipe that say how a step trains, `[train]`, and how its weights reach the engines, `[weights]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from astracli.config.recipe_run import Table

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

Recomputed = Literal["none", "selective", "full"]
"""What a backward pass computes again of the blocks' forward passes."""
SHARE_ABOVE = {"cpu": 0.35, "cuda": 0.45}
"""Of `train.share_prompts = auto`, by device: the part of a batch's tokens above which leaving them out saves more than
a tenth of a step (docs/benchmarks.md, "Prompts forwarded once")."""
RECOMPUTED_BLOCKS: dict[Recomputed, int] = {"full": 1, "selective": 2}
"""Mode of `train.activation_checkpointing` -> every how many-th block the backward pass computes again."""
Sharding = Literal["optimizer", "gradients", "parameters", "full"]
"""What the ranks of a trainer divide among them; each holds the rest whole (`train.sharding`)."""


class TrainTable(Table):
    steps: PositiveInt
    """Steps of the run. A step trains on one batch and publishes one version of the weights."""
    batch_groups: int = Field(default=32, gt=0, le=1_000_000)
    """Groups per step. Dropped groups do not count."""
    minibatches: PositiveInt = 4
    """Optimizer steps per step."""
    tokens_per_microbatch: PositiveInt = 8192
    """Token budget of one forward and backward pass, including padding."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """How a micro-batch holds its samples. `packed`: one row without padding; a check at the start proves that nothing
    leaks from one sample into another. `padded`: one row per sample. `auto`: packed on a GPU, padded on a CPU."""
    share_prompts: bool | Literal["auto"] = "auto"
    """Compute the prompt of a group once in a packed row, and let its samples go on from it: attention sees the
    prompt's keys and values, recurrent layers begin with the state at its end. The gradient is that of separate rows,
    and the check at the start proves it. Groups then stay together, in a minibatch and on a rank too, where that is
    less work. `auto`: in every batch where it saves more than a tenth of a step, by the lengths of its rows; not where
    the adapter or another setting does not allow it, and the plan says why. `true`: in every batch. `false`: never;
    rows and minibatches are then divided as they are without this setting."""
    row_boundaries: Literal["reset", "ignored"] = "reset"
    """`ignored` is only for an ablation, and its results are wrong: in packed rows of a hybrid, the recurrent and
    convolution states run on from one sample into the next, as they do if these layers do not know the boundaries
    (attention still stops at them). The checks of rows and of the engine then report differences instead of ending the
    run."""
    rows_check_every: PositiveInt = 50
    """Every so many steps, log-probabilities and gradient of packed or padded rows are compared with those of separate
    rows. The first batch of a process is always compared."""
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly to `learning_rate`."""
    final_lr_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate at the end of `linear` and `cosine`, as a fraction of `learning_rate`."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)
    """AdamW's decay rates of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """`all`: every trained parameter decays, as in torch and AstraFlow. `matrices`: only parameters with two or more
    dimensions, so norms, biases, `A_log` and `dt_bias` do not decay."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    max_staleness: NonNegativeInt = 8
    """How many versions a token may lag behind the policy that trains on it. 0 is on-policy: rollout waits for every
    update. Deterministic mode always uses 0."""
    consume: Literal["edf", "fifo"] = "edf"
    """Which waiting groups a step takes. `edf` (earliest deadline first) loses no group to staleness. `fifo` (in order
    of arrival) prefers quick prompts and loses late groups."""
    replay_ratio: NonNegativeInt = 0
    """Every batch is trained on again up to n times, in the steps after its first, as long as no token of it exceeds
    `max_staleness`. A replay is a step: it counts in `steps` and publishes a version."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass computes again: `none`, nothing; `selective`, every second block; `full`, every block
    (least memory, a third more work). `auto` is the quickest that the GPU has memory for, AdamW's moments on the host
    weighed against it; beside an engine `full` unless there is plenty; on a CPU `none`."""
    sharding: Literal["auto", "optimizer", "gradients", "parameters", "full"] = "auto"
    """What several ranks divide among them. `optimizer`: master weights and moments; every rank holds all weights and
    gradients, and gradients are summed and weights exchanged once a minibatch (ZeRO-1). `gradients`: these too, so
    they are summed in every micro-batch, and weights are gathered once a minibatch (ZeRO-2). `parameters`: masters,
    moments and weights, so weights are gathered in every pass, and gradients are summed once a minibatch. `full`: all
    of them (ZeRO-3), which needs least memory and most communication. `auto` is the quickest that the GPUs have memory
    for; on a CPU `optimizer`, in deterministic mode `full`. One rank divides nothing."""
    reference_device: Literal["auto", "gpu", "host"] = "auto"
    """Where the initial model of the KL term is kept between scoring passes, and with `[lora]` the matrices without
    their adapters, from which every update begins. `host` is pinned memory. `auto`: the GPU if it has room. It has no
    effect on a CPU."""
    optimizer_device: Literal["auto", "gpu", "host"] = "auto"
    """Where AdamW's moments are kept between updates: on the GPU, or in pinned memory of the host, from which they pass
    through the GPU in every update. `auto` divides them between both as is quickest."""
    attention: str = "auto"
    """Attention of the trainer: `auto`, `sdpa`, `eager`, or another one that the backend table offers."""
    parity_tolerance: PositiveFloat | None = None
    """Largest allowed mean |trainer - engine| log-probability over the tokens of a batch with staleness 0. A larger
    value ends the run, at any step. None: the adapter's tolerance, or twice `parity_noise`, at most 0.1, if an engine
    in bf16 needs more."""


class WeightsTable(Table):
    transfer: Literal["full", "delta", "adapter"] = "full"
    """What of a version travels to the engines: all weights, only the values that changed, or, with `[lora]`, the
    adapter, which the receiver merges into the weights."""
    full_interval: PositiveInt = 10
    """With `delta` and `adapter`: every n-th version is also sent in full."""
    keep: PositiveInt = 12
    """How many published versions stay on disk. Versions that are still needed are kept in addition."""
    pause_mode: Literal["abort", "retract", "in_place"] = "in_place"
    """What happens to running requests during an update. `in_place`: they continue with the keys and values that they
    have. `retract`: keys and values are computed again. `abort`: their segment ends, and prompt and prefix are sent
    again."""
    background: Literal["auto", "on", "off"] = "auto"
    """Publish a version while the next step trains. `auto`: if the trainer runs on GPUs, but not in deterministic mode
    and not with time sharing."""
    verify_interval: PositiveInt = 1
    """Read the engine's weights back and compare digests every n-th version."""
    compression_level: int = Field(default=1, ge=1, le=19)
    """zstd level of a payload."""
