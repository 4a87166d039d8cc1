"""The recipe schema: every setting of a run, its unit, its range and its reason.

One value stands in one place. Unknown keys are refused (`recipe_io` turns pydantic's complaint into one message).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Table(BaseModel):
    """Base of every table: immutable, and strict about its keys and types (`"80"` is no number, 1 is no boolean)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(Table):
    path: str = Field(min_length=1)
    """`astra:tiny` (shipped with the package), a local directory, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None is the Hub's default branch."""
    adapter: str = "auto"
    """Name of a model adapter, or `auto`: the one that claims the checkpoint's `model_type`."""


class DataTable(Table):
    source: str = Field(min_length=1)
    """`arithmetic` (generated), a registered name, a local .jsonl/.parquet file, or a Hub dataset id."""
    split: str = "train"
    revision: str | None = None
    levels: list[Literal["add2", "sub2", "add3", "sub3"]] = Field(
        default=["add2", "sub2", "add3", "sub3"], min_length=1
    )
    """Difficulty levels of the generated arithmetic family, drawn uniformly (other sources ignore it)."""
    question_field: str = "problem"
    answer_field: str = "answer"
    prompt: str = "{question}"
    """What the user turn says; `{question}` is the problem text."""
    max_prompt_tokens: PositiveInt = 2000
    """Longer prompts are skipped and counted."""
    decontaminate: Literal["report", "remove", "off"] = "report"
    """Training problems that are also items of `eval.benchmarks`: counted and said, left out, or not looked for."""
    reward: str = "math"
    """`math`, `probe`, a name from the entry-point group `astra.rewards`, or `pkg.module:function`."""
    reward_timeout_s: PositiveFloat = 5.0
    """One grading may take this long; then its worker is killed, the reward is 0 and a timeout is counted."""
    reward_workers: PositiveInt = 1
    """Grading processes."""


class RolloutTable(Table):
    engine: Literal["auto", "embedded", "sglang"] = "auto"
    group_size: PositiveInt = 8
    """Samples per prompt."""
    temperature: PositiveFloat = 1.0
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_new_tokens: PositiveInt = 4000
    context_length: PositiveInt = 8192
    """Prompt and completion together, tokens."""
    max_running_requests: PositiveInt = 32
    """Sequences that one engine decodes at once. Hybrids hold a state cache per sequence beside the KV cache."""
    attention_backend: str = "auto"
    linear_attention_backend: str = "auto"
    mem_fraction_static: float = Field(default=0.7, gt=0.0, lt=1.0)
    chunked_prefill_size: PositiveInt = 8192
    """Tokens of one prefill chunk; bounds the fp32 logits of a prefill."""


class TrainTable(Table):
    steps: PositiveInt
    """Steps of the run. A step is one batch, a version is one publish, one publish a step."""
    batch_groups: PositiveInt = 32
    """Groups that a step trains on; dropped groups do not count."""
    minibatches: PositiveInt = 4
    """Optimizer steps per step."""
    tokens_per_microbatch: PositiveInt = 8192
    """Token budget (padding included) of one forward and backward."""
    learning_rate: PositiveFloat = 5e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_lr_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where `linear` and `cosine` end, as a fraction of `learning_rate`."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    max_staleness: NonNegativeInt = 8
    """Versions a token may lag behind the policy that trains on it. 0 = on-policy: rollout waits for every update.
    Read it as `Recipe.effective_staleness`, which is 0 in deterministic mode."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    attention: str = "auto"
    """Trainer attention: `auto`, `sdpa`, `eager`, or what the backend table offers."""
    parity_tolerance: PositiveFloat | None = None
    """Largest mean |trainer - engine| log-probability at staleness 0; None takes the adapter's."""


class AlgorithmTable(Table):
    name: str = "m2po"
    """One file in `astracli/rl/losses`: `m2po`, `grpo`."""
    variant: Literal["mask", "waterfill", "clip"] = "clip"
    """Which published form of M2PO (other algorithms ignore it)."""
    m2_threshold: PositiveFloat = 0.01
    """Bound on the second moment of the log-ratio over candidate tokens."""
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    """PPO clip range of `grpo`: [1 - clip_low, 1 + clip_high]."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 KL estimate to the initial model; 0 loads no reference."""
    advantage: Literal["group", "mean"] = "group"
    """`group`: (r - mean) / (unbiased std + 1e-5) inside the group; `mean`: r - mean."""
    batch_norm_advantage: bool = False
    """Normalise the advantages once more over the batch."""
    drop_equal_groups: bool = True
    """Leave out groups whose rewards are all equal: they carry no gradient."""

    @property
    def needs_group(self) -> bool:
        return self.advantage in ("group", "mean")


class WeightsTable(Table):
    transfer: Literal["full", "delta"] = "full"
    full_interval: PositiveInt = 10
    """With `delta`: every n-th version travels in full."""
    keep: PositiveInt = 12
    """Published versions kept on disk (pinned ones stay besides)."""
    pause_mode: Literal["abort", "retract", "in_place"] = "abort"
    """What happens to running requests at an update; `abort` ends their segment and resubmits prompt + prefix."""
    verify_interval: PositiveInt = 1
    """Read the engine's weights back and compare digests every n-th version."""
    compression_level: int = Field(default=1, ge=1, le=19)
    """zstd level of a payload."""


class EvalTable(Table):
    benchmarks: list[str] = []
    every: NonNegativeInt = 10
    """Evaluate at step 0, every n steps and at the end; 0 switches in-run evaluation off."""
    samples: PositiveInt | None = None
    """Samples per item; None takes each benchmark's own."""
    pass_k: PositiveInt = 4
    temperature: NonNegativeFloat = 0.6
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_new_tokens: PositiveInt | None = None
    """None takes `rollout.max_new_tokens`."""
    max_concurrency: PositiveInt = 64
    """Evaluation requests in flight at once."""


class CheckpointTable(Table):
    every: PositiveInt = 10
    keep: PositiveInt = 2
    """Newest checkpoints kept on disk."""


class EngineEnv(Table):
    python: str | None = None
    """Interpreter of the engine's own environment; None is this one."""
    env: dict[str, str] = {}


class ThreadsTable(Table):
    engine: PositiveInt = 1
    trainer: PositiveInt = 1
    other: PositiveInt = 1
    """CPU threads per process; two cores want one each."""


class ResourcesTable(Table):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollout_gpus: NonNegativeInt = 0
    train_gpus: NonNegativeInt = 0
    share_gpus: bool = False
    """Engine and trainer on the same GPUs."""
    engines: PositiveInt = 1
    """Engine processes on a CPU; on GPUs there is one per rollout GPU."""
    train_ranks: PositiveInt = 1
    """Trainer processes on a CPU (FSDP2 over gloo); on GPUs one per training GPU."""
    engine: EngineEnv = EngineEnv()
    threads: ThreadsTable = ThreadsTable()


class LaunchTable(Table):
    host: str = "127.0.0.1"
    deterministic: bool = False
    """Same bytes from run to run: staleness 0, fixed slots, batches sorted by id."""
    max_restarts: NonNegativeInt | None = None
    """Restarts of an engine or rollout worker; None is 0 on a CPU and 2 on GPUs."""
    ready_timeout_s: PositiveFloat = 600.0
    heartbeat_timeout_s: PositiveFloat = 60.0
    lease_timeout_s: PositiveFloat = 600.0


class MetricsTable(Table):
    sinks: list[str] = []
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio` (extras), or `pkg.module:factory`."""
    samples_per_step: NonNegativeInt = 8
    """Rollout samples written to `samples/` per step."""


class ExpectedTable(Table):
    """Published or measured figures to show beside ours: fractions in [0, 1]."""

    source: str
    machine: str
    avg_at_n_first: float | None = None
    avg_at_n_last: float | None = None
    pass_at_k_first: float | None = None
    pass_at_k_last: float | None = None
    steps: int | None = None
    note: str | None = None


class Recipe(Table):
    name: str = "unnamed"
    description: str = ""
    seed: NonNegativeInt = 0
    model: ModelTable
    data: DataTable
    rollout: RolloutTable = RolloutTable()
    train: TrainTable
    algorithm: AlgorithmTable = AlgorithmTable()
    weights: WeightsTable = WeightsTable()
    eval: EvalTable = EvalTable()
    checkpoint: CheckpointTable = CheckpointTable()
    resources: ResourcesTable = ResourcesTable()
    launch: LaunchTable = LaunchTable()
    metrics: MetricsTable = MetricsTable()
    expected: ExpectedTable | None = None

    @property
    def effective_staleness(self) -> int:
        """Versions a token may lag behind in this run: `train.max_staleness`, and 0 when `launch.deterministic`."""
        return 0 if self.launch.deterministic else self.train.max_staleness

    @property
    def batch_sequences(self) -> int:
        """Sequences of one step: `train.batch_groups` x `rollout.group_size`."""
        return self.train.batch_groups * self.rollout.group_size

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        rollout, train, evaluation = self.rollout, self.train, self.eval
        if rollout.group_size < 2 and self.algorithm.needs_group:
            raise ValueError(
                f"rollout.group_size = {rollout.group_size}: "
                "group-normalised advantages need at least 2 samples a prompt"
            )
        if rollout.max_new_tokens >= rollout.context_length:
            raise ValueError(
                f"rollout.max_new_tokens = {rollout.max_new_tokens} leaves no room for a prompt in "
                f"rollout.context_length = {rollout.context_length}"
            )
        if evaluation.max_new_tokens is not None and evaluation.max_new_tokens >= rollout.context_length:
            raise ValueError(
                f"eval.max_new_tokens = {evaluation.max_new_tokens} leaves no room for a prompt in "
                f"rollout.context_length = {rollout.context_length}"
            )
        if train.minibatches > self.batch_sequences:
            raise ValueError(
                f"train.minibatches = {train.minibatches} is more than the {self.batch_sequences} sequences of a step "
                f"(train.batch_groups = {train.batch_groups} x rollout.group_size = {rollout.group_size})"
            )
        if evaluation.samples is not None and evaluation.samples < evaluation.pass_k:
            raise ValueError(
                f"eval.samples = {evaluation.samples} is fewer than eval.pass_k = {evaluation.pass_k}: "
                "pass@k needs at least k samples an item"
            )
        if "{question}" not in self.data.prompt:
            raise ValueError(f"data.prompt = {self.data.prompt!r} has no {{question}} in it")
        return self
