"""The recipe schema: every setting of a run, its unit, its range and its reason.

One value stands in one place. Unknown keys are refused (`recipe_io` turns pydantic's complaint into one message).
The tables of problems and rewards stand in `recipe_data` and `recipe_rewards`, generation in `recipe_rollout`,
environments in `recipe_env`, training and how weights travel in `recipe_train`, how and where a run goes in
`recipe_run`; the others here.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    create_model,
    model_validator,
)

from astracli.config import recipe_clusters, recipe_data
from astracli.config.algorithms import AlgorithmTable, find
from astracli.config.recipe_data import DataTable, EvalSetTable
from astracli.config.recipe_env import EnvTable
from astracli.config.recipe_lora import LoraTable
from astracli.config.recipe_rollout import NonEmpty, Requests, RolloutTable, Tokens
from astracli.config.recipe_run import (
    CheckpointTable,
    ExpectedTable,
    LaunchTable,
    MetricsTable,
    ResourcesTable,
    Table,
)
from astracli.config.recipe_sft import SftTable
from astracli.config.recipe_train import TrainTable, WeightsTable

Samples = Annotated[int, Field(gt=0, le=100_000)]


class ModelTable(Table):
    path: str = Field(min_length=1)
    """`astra:tiny` (shipped with the package), a local directory, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None is the Hub's default branch."""
    made_by: str | None = None
    """The command that makes a local `path`. It is shown when nothing is there."""
    weights: Literal["checkpoint", "random"] = "checkpoint"
    """`random`: a training run starts from random weights, drawn by `seed`. `path` gives the config, the tokenizer and
    the names of the tensors."""
    adapter: str = "auto"
    """Name of a model adapter. `auto`: the adapter that claims the checkpoint's `model_type`."""
    thinking: Literal["on", "off"] = "off"
    """Whether the model thinks before it answers, if its chat template has this choice (`enable_thinking`)."""
    template_args: dict[str, str | bool | int | float] = Field(default={})
    """More arguments for the chat template, for example `{ reasoning_effort = "low" }`."""
    assistant_prefix: str = ""
    """Text at the beginning of every answer. It is part of the prompt: it is not trained, and rewards do not see it."""


class EvalTable(Table):
    benchmarks: list[str] = Field(default=[])
    """Names of known benchmarks or of `[eval.sets.NAME]`, files, directories and Hub ids. What `data.holdout` holds out
    is added."""
    sets: dict[str, EvalSetTable] = Field(default={})
    """Benchmarks of one's own that are read otherwise than `[data]` says: `[eval.sets.NAME]`."""
    every: NonNegativeInt = 10
    """Evaluate at step 0, every n steps and at the end. 0: no evaluation during the run. If an evaluation is due while
    another one runs, it starts when that one ends, with the version that is then current."""
    samples: Samples | dict[str, Samples] | None = None
    """Samples per item: one number, or a table such as `{ aime24 = 4, math500 = 1 }`. Benchmarks that are not named use
    their own number, and so do all of them with None."""
    greedy: bool = False
    """Also draw one greedy sample per item at every evaluation of a run."""
    pass_k: PositiveInt = 4
    """The k of pass@k. For a benchmark with fewer samples, k is the number of samples."""
    temperature: float = Field(default=0.6, ge=0.0, le=100.0)
    """Sampling temperature. 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens with this much probability. 1 is off."""
    max_new_tokens: Tokens | None = None
    """None takes `rollout.max_new_tokens`."""
    env: NonEmpty | None = None
    """The environment of evaluations. None: `rollout.env`."""
    max_concurrency: Requests | Literal["auto"] = "auto"
    """Evaluation requests in flight at once on each engine; `auto`: as many as it decodes at once
    (`rollout.max_running_requests`)."""
    slot_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Part of each engine's slots that an evaluation gets while rollouts could use all of them. It gets more when
    rollouts have nothing to do, and less when it needs less."""

    def samples_of(self, benchmark: str, own: int) -> int:
        """Samples of each item of a benchmark, whose own number is `own`."""
        if isinstance(self.samples, dict):
            return self.samples.get(benchmark, own)
        return self.samples or own


class Recipe(Table):
    name: str = "unnamed"
    """Shown by commands and in reports."""
    description: str = ""
    """One line for `astra recipes list`."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Of everything that is drawn at random: prompts, samples, evaluations."""
    model: ModelTable
    data: DataTable
    rollout: SerializeAsAny[RolloutTable] = Field(default_factory=lambda: RolloutTable.model_validate({}))
    env: EnvTable = EnvTable()
    train: TrainTable
    lora: LoraTable | None = None
    sft: SftTable | None = None
    algorithm: SerializeAsAny[AlgorithmTable] = Field(default_factory=lambda: AlgorithmTable.model_validate({}))
    weights: WeightsTable = WeightsTable()
    eval: EvalTable = EvalTable()
    checkpoint: CheckpointTable = CheckpointTable()
    resources: ResourcesTable = ResourcesTable()
    launch: LaunchTable = LaunchTable()
    metrics: MetricsTable = MetricsTable()
    expected: ExpectedTable | None = None

    @classmethod
    def brought(cls) -> dict[str, type[Table]]:
        return recipe_clusters.tables()

    @property
    def agents(self) -> tuple[str, ...]:
        """Hosts other than the first, where agents start the processes."""
        hosts = self.launch.hosts
        if not isinstance(hosts, str):
            return tuple(hosts[1:])
        own = getattr(self, hosts, None) if hosts in self.brought() else None
        return tuple(recipe_clusters.nodes(own.nodes)[1:]) if isinstance(own, recipe_clusters.ClusterTable) else ()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """`resources.device`; `auto` is a GPU where the recipe asks for any."""
        asked = self.resources
        if asked.device != "auto":
            return asked.device
        return "cuda" if asked.rollout_gpus + asked.train_gpus else "cpu"

    @property
    def effective_staleness(self) -> int:
        """Versions a token may lag behind in this run: `train.max_staleness`, and 0 when `launch.deterministic`."""
        return 0 if self.launch.deterministic else self.train.max_staleness

    @property
    def command(self) -> Literal["train", "sft"]:
        """The command that trains with this recipe."""
        return "train" if self.sft is None else "sft"

    @property
    def training_data(self) -> DataTable:
        """`[data]` as training reads it: examples of `astra sft` need no right answer."""
        return self.data if self.sft is None else self.data.model_copy(update={"answer_field": ""})

    @property
    def batch_sequences(self) -> int:
        """Sequences of one step: `train.batch_groups` x `rollout.group_size`; with `[sft]` `train.batch_groups`."""
        return self.train.batch_groups * (self.rollout.group_size if self.sft is None else 1)

    def evaluation_due(self, step: int) -> bool:
        """Whether the version after `step` steps is to be evaluated."""
        every = self.eval.every if self.eval.benchmarks else 0
        return every > 0 and (step % every == 0 or step == self.train.steps)

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state after `step` steps is written as a checkpoint."""
        every, evaluations = self.checkpoint.every, self.eval.every if self.checkpoint.best is not None else 0
        if not every:
            return False
        return step % every == 0 or step == self.train.steps or (evaluations > 0 and step % evaluations == 0)

    @property
    def most_reward_errors(self) -> int:
        """`data.max_reward_errors`; None is one step's samples."""
        most = self.data.max_reward_errors
        return self.batch_sequences if most is None else most

    @property
    def evaluation_env(self) -> str:
        """`eval.env`, without one `rollout.env`."""
        return self.eval.env or self.rollout.env

    @property
    def evaluation_requests(self) -> int:
        """`eval.max_concurrency`; `auto` is what an engine decodes at once."""
        most = self.eval.max_concurrency
        return self.rollout.running if most == "auto" else most

    @model_validator(mode="wrap")
    @classmethod
    def _with_clusters(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A recipe with the tables of the installed clusters, looked up here: a cluster may import this module."""
        if cls is Recipe and isinstance(values, dict):
            return cast(Self, _with_clusters().model_validate(values))
        return handler(values)

    @model_validator(mode="wrap")
    @classmethod
    def _with_held_out(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """What the sources hold out is evaluated: its benchmarks stand in `eval.benchmarks`."""
        recipe = handler(values)
        added = [name for name in recipe_data.held_out(recipe.data) if name not in recipe.eval.benchmarks]
        if not added:
            return recipe
        evaluation = recipe.eval.model_copy(update={"benchmarks": [*recipe.eval.benchmarks, *added]})
        return recipe.model_copy(update={"eval": evaluation})

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        rollout, train, evaluation = self.rollout, self.train, self.eval
        algorithm = find(self.algorithm.name)
        if rollout.group_size < algorithm.smallest_group:
            raise ValueError(
                f"rollout.group_size = {rollout.group_size}: "
                f"the advantages of {self.algorithm.name} need at least {algorithm.smallest_group} samples a prompt"
            )
        for key, (value, does) in algorithm.excluded.items():
            if getattr(self.algorithm, key) == value:
                said = f"algorithm.{key} = {str(value).lower()} {does}"
                raise ValueError(f"{said}: that is not {self.algorithm.name}, take another algorithm.name for it")
        if rollout.max_new_tokens >= rollout.context_length:
            raise ValueError(
                f"rollout.max_new_tokens = {rollout.max_new_tokens} leaves no room for a prompt in "
                f"rollout.context_length = {rollout.context_length}"
            )
        for key in rollout.running_ceiling:
            if not re.fullmatch(r"[1-9]\d{0,5}", key):
                raise ValueError(
                    f"rollout.running_ceiling has the key `{key}`: a GPU's memory in whole GiB is meant, such as 48"
                )
        if evaluation.max_new_tokens is not None and evaluation.max_new_tokens >= rollout.context_length:
            raise ValueError(
                f"eval.max_new_tokens = {evaluation.max_new_tokens} leaves no room for a prompt in "
                f"rollout.context_length = {rollout.context_length}"
            )
        if train.replay_ratio > self.effective_staleness:
            limit = "launch.deterministic" if self.launch.deterministic else "train.max_staleness"
            raise ValueError(
                f"train.replay_ratio = {train.replay_ratio}, but {limit} lets a token lag at most "
                f"{self.effective_staleness} versions behind: the n-th replay of a batch trains it n versions late"
            )
        if train.minibatches > self.batch_sequences:
            groups = f"train.batch_groups = {train.batch_groups}"
            raise ValueError(
                f"train.minibatches = {train.minibatches} is more than the {self.batch_sequences} sequences of a step "
                f"({groups} examples)"
                if self.sft is not None
                else f"train.minibatches = {train.minibatches} is more than the {self.batch_sequences} sequences of a "
                f"step ({groups} x rollout.group_size = {rollout.group_size})"
            )
        if isinstance(evaluation.samples, int) and evaluation.samples < evaluation.pass_k:
            raise ValueError(
                f"eval.samples = {evaluation.samples} is fewer than eval.pass_k = {evaluation.pass_k}: "
                "pass@k needs at least k samples an item"
            )
        if self.env.tools and rollout.env == self.evaluation_env == "single_turn":
            raise ValueError(
                'env.tools is for an environment that calls tools, but rollout.env = "single_turn": '
                'set rollout.env = "tools"'
            )
        return self

    @model_validator(mode="after")
    def _coherent_hosts(self) -> Recipe:
        agents = self.agents
        if problem := self.launch.problem(agents) or self.launch.ranks_problem(self.resources, agents):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _coherent_over_tables(self) -> Recipe:
        best, evaluation = self.checkpoint.best, self.eval
        if best is not None and best not in (*evaluation.benchmarks, "overall"):
            names = ", ".join([*evaluation.benchmarks, "overall"])
            raise ValueError(f"checkpoint.best = {best!r} is no benchmark of this run: it takes one of {names}")
        if best is not None and not (evaluation.benchmarks and evaluation.every and self.checkpoint.every):
            absent = next(
                key
                for key, value in (
                    ("eval.benchmarks", evaluation.benchmarks),
                    ("eval.every", evaluation.every),
                    ("checkpoint.every", self.checkpoint.every),
                )
                if not value
            )
            raise ValueError(f"checkpoint.best = {best!r} needs evaluations and checkpoints, but {absent} is off")
        if self.weights.transfer == "adapter" and self.lora is None:
            raise ValueError("weights.transfer = adapter, but there is no table [lora]: all weights are trained")
        if self.lora is not None and self.train.sharding not in ("auto", "full"):
            raise ValueError(f"train.sharding = {self.train.sharding}, but with [lora] ranks divide the frozen weights")
        for key, wrong in (
            ("algorithm.kl_coef", self.algorithm.kl_coef),
            ("data.curriculum", self.data.curriculum),
            ("train.replay_ratio", self.train.replay_ratio),
        ):
            if self.sft is not None and wrong:
                raise ValueError(f"{key} is for reinforcement learning, but with [sft] there are no rollouts")
        band = self.data.curriculum
        if band is not None and band.low > band.high:
            raise ValueError(f"data.curriculum.low = {band.low} is over data.curriculum.high = {band.high}")
        if problem := recipe_data.contradiction(self.data) or recipe_data.set_problem(evaluation.sets):
            raise ValueError(problem)
        return self


@cache
def _with_clusters() -> type[Recipe]:
    fields: dict[str, Any] = {name: (table, table()) for name, table in Recipe.brought().items()}
    return create_model("Recipe", __base__=Recipe, **fields)
