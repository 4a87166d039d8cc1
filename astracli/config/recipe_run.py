"""Tables of a recipe that say how, where and with what output a run goes, not what it learns.

All of it but `launch.deterministic` may change on a resume; `launch.resume_rules` says what else may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

Processes = Annotated[int, Field(ge=0, le=1024)]
"""How many processes, ranks, GPUs or threads of one kind."""
SomeProcesses = Annotated[int, Field(gt=0, le=1024)]


class Table(BaseModel):
    """Base of every table: immutable, and strict about its keys and types (`"80"` is no number, 1 is no boolean)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def brought(cls) -> dict[str, type[Table]]:
        """Tables inside this one that installed packages bring, by key."""
        return {}

    @classmethod
    def largest(cls) -> int:
        """No number in it is larger, whatever else its field allows."""
        return 2**32 - 1

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if any(abs(number) > cls.largest() for number in _numbers(value)):
            hint = f"no number in a recipe is over {cls.largest()}"
            raise PydanticCustomError("refused", "is out of range", {"hint": hint})
        return value


def _numbers(value: Any) -> Iterable[float]:
    """The numbers of a plain value."""
    if isinstance(value, dict):
        value = [*value.values()]
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, int | float):
            yield item


class CheckpointTable(Table):
    every: NonNegativeInt = 10
    """Steps; the last step always. 0: none at all, so that a run which dies begins anew."""
    keep: PositiveInt = 2
    """Newest checkpoints kept on disk."""
    best: str | None = None
    """A benchmark of `eval.benchmarks`, or `overall`: the checkpoint with its best score is kept besides the newest, of
    equal ones the earlier. A checkpoint is then also made at every step at which an evaluation is due, and an
    evaluation that has to wait takes the next version with a checkpoint."""


class EngineEnv(Table):
    python: str | None = None
    """Interpreter of the engine's own environment; None is this one."""
    env: dict[str, str] = {}
    """Set for the engine alone; a PYTHONPATH here gives it other packages than the trainer's."""

    @property
    def foreign(self) -> bool:
        """Whether the engine sees other packages than this process does."""
        return self.python is not None or "PYTHONPATH" in self.env


class ThreadsTable(Table):
    engine: SomeProcesses = 1
    trainer: SomeProcesses = 1
    other: SomeProcesses = 1
    """CPU threads per process; two cores want one each."""


class ResourcesTable(Table):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollout_gpus: Processes = 0
    train_gpus: Processes = 0
    share_gpus: bool = False
    """Engine and trainer on the same GPUs."""
    share_mode: Literal["auto", "side_by_side", "time_sharing"] = "auto"
    """How they share: `side_by_side`, each keeps its part (the engine reserves what the trainer leaves);
    `time_sharing`: the trainer waits in host memory while the engine generates, and the engine gives its KV cache
    back for a training step. `auto` is `time_sharing` only where the two do not fit side by side."""
    engines: SomeProcesses = 1
    """Engine processes on a CPU; on GPUs there is one per rollout GPU."""
    train_ranks: SomeProcesses = 1
    """Trainer processes on a CPU (FSDP2 over gloo); on GPUs one per training GPU."""
    engine: EngineEnv = EngineEnv()
    threads: ThreadsTable = ThreadsTable()


class LaunchTable(Table):
    host: str = "127.0.0.1"
    deterministic: bool = False
    """Same bytes from run to run: staleness 0, fixed slots, batches sorted by id."""
    max_restarts: NonNegativeInt | None = None
    """Restarts of an engine or rollout worker within `restart_window_s`; None is 0 on a CPU and 2 on GPUs."""
    restart_window_s: PositiveFloat = 3600.0
    """Seconds over which restarts are counted: in a run of days a process may fail now and then, and one that fails
    again at once will not do better."""
    max_resumes: NonNegativeInt | None = None
    """How often a run whose trainer ended of what may pass (a CUDA error, a collective that timed out, a rank that was
    killed) goes on from its newest checkpoint by itself; None is 0 on a CPU and 5 on GPUs. Twice alike at one step ends
    the run, and so does whatever a new start would only repeat."""
    ready_timeout_s: PositiveFloat = 600.0
    heartbeat_timeout_s: PositiveFloat = 60.0
    lease_timeout_s: PositiveFloat = 600.0
    hub_history_steps: PositiveInt | None = None
    """Steps whose groups stay listed in hub.sqlite, a row each. Older rows are counted and deleted: the file stops
    growing. None is 100, and 1000 with `data.curriculum`, which reads solve rates from these rows. (What was generated
    leaves it sooner: once the second checkpoint after its step is acknowledged, or the next step without any.)"""


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
