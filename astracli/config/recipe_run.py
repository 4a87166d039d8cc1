"""Tables of a recipe that say how, where and with what output a run goes, not what it learns.

All of it but `launch.deterministic` may change on a resume; `launch.resume_rules` says what else may.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

Processes = Annotated[int, Field(ge=0, le=1024)]
"""How many processes, ranks, GPUs or threads of one kind."""
SomeProcesses = Annotated[int, Field(gt=0, le=1024)]
HOST_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
HostName = Annotated[str, Field(pattern=HOST_NAME)]
"""Of a machine: it also names files."""
NEWCOMER = "new"
"""Names the token file of hosts that are not in `launch.hosts`."""


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
    """Every n steps, and at the last step. 0: no checkpoints, so a run that fails starts again from the beginning."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    best: str | None = None
    """A benchmark of `eval.benchmarks`, or `overall`. The checkpoint with the best score is then kept in addition to
    the newest ones; of equal scores, the earlier one. There is then also a checkpoint at every step at which an
    evaluation is due, and an evaluation that has to wait takes the next version with a checkpoint."""


class EngineEnv(Table):
    python: str | None = None
    """Python interpreter of the engine's own environment. None: the one that runs astra."""
    env: dict[str, str] = {}
    """Environment variables for the engine alone. With a PYTHONPATH here the engine has other packages than the
    trainer."""

    @property
    def foreign(self) -> bool:
        """Whether the engine sees other packages than this process does."""
        return self.python is not None or "PYTHONPATH" in self.env


class ThreadsTable(Table):
    engine: SomeProcesses = 1
    """CPU threads of each engine."""
    trainer: SomeProcesses = 1
    """CPU threads of each trainer process."""
    other: SomeProcesses = 1
    """CPU threads of each other process. On two cores, one for each process is best."""


class ResourcesTable(Table):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if the recipe asks for any, else the CPU."""
    rollout_gpus: Processes = 0
    """GPUs for engines."""
    train_gpus: Processes = 0
    """GPUs for the trainer."""
    share_gpus: bool = False
    """Engine and trainer use the same GPUs."""
    share_mode: Literal["auto", "side_by_side", "time_sharing"] = "auto"
    """How they share a GPU. `side_by_side`: each keeps its part, and the engine reserves what the trainer leaves.
    `time_sharing`: the trainer waits in host memory while the engine generates, and the engine releases its KV cache
    for a training step. `auto`: `time_sharing` only if both do not fit side by side."""
    gpu_memory_gib: Annotated[float, Field(ge=1.0, le=4096.0)] | None = None
    """Most memory that a run uses of each GPU, in GiB. The plan is then that of a smaller GPU: engines reserve their
    part of it, and torch gives a trainer no more. None: all of it."""
    engines: SomeProcesses = 1
    """Engine processes on a CPU. On GPUs there is one per rollout GPU."""
    train_ranks: SomeProcesses = 1
    """Trainer processes on a CPU (FSDP2 over gloo). On GPUs there is one per training GPU."""
    engine: EngineEnv = EngineEnv()
    threads: ThreadsTable = ThreadsTable()


class LaunchTable(Table):
    host: str = "127.0.0.1"
    """Address on which the hub and the engines listen. Beyond this machine it needs `network = "private"`."""
    network: Literal["loopback", "private"] = "loopback"
    """`private`: addresses beyond this machine may be used, because nobody but you can reach that network. What is sent
    is not encrypted, and the collectives of torch and NCCL know no token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the hub. 0: one that is free. A fixed one lets agents be started before the run."""
    hosts: Literal["local"] | Annotated[list[HostName], Field(min_length=1)] = "local"
    """`local`: every process runs here. A list of names: the trainer runs on the first, which is this machine, and the
    engines on the others, where `astra agent` has been started. With a list, more hosts may join while the run goes
    on."""
    agent_lease_s: PositiveFloat = 45.0
    """An agent that has not heard the hub for so long ends its processes; the run then goes on without it. At most
    five sixths of `heartbeat_timeout_s`."""
    deterministic: bool = False
    """Every run with the same recipe gives the same bytes: staleness 0, fixed slots, batches sorted by id."""
    max_restarts: NonNegativeInt | None = None
    """How often an engine or rollout worker is restarted within `restart_window_s`. None: 0 on a CPU, 2 on GPUs."""
    restart_window_s: PositiveFloat = 3600.0
    """Restarts within this many seconds count together. In a run of days a process may fail now and then; one that
    fails again at once will not recover."""
    max_resumes: NonNegativeInt | None = None
    """How often a run continues by itself from its newest checkpoint after its trainer ended with an error that may not
    happen again: a CUDA error, a collective that timed out, a rank that was killed. None: 0 on a CPU, 5 on GPUs. The
    same error twice at one step ends the run, and so does any error that would happen again."""
    ready_timeout_s: PositiveFloat = 600.0
    """Time limit for each process to become ready."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """A process that gives no sign of life for so long is considered to hang."""
    lease_timeout_s: PositiveFloat = 600.0
    """A lease that is not renewed for so long expires; its group is generated again."""
    hub_history_steps: PositiveInt | None = None
    """Steps whose groups stay listed in hub.sqlite, a row each. Older rows are counted and deleted: the file stops
    growing. None: 100, or 1000 with `data.curriculum`, which reads solve rates from these rows. (What was generated
    leaves it sooner: once the second checkpoint after its step is acknowledged, or the next step without any.)"""

    @property
    def agents(self) -> tuple[str, ...]:
        """Hosts other than the first, where agents start the processes."""
        return () if isinstance(self.hosts, str) else tuple(self.hosts[1:])

    def problem(self) -> str | None:
        """Why these values do not go together; None when they do."""
        if not is_loopback(self.host) and self.network != "private":
            return (
                f'launch.host = "{self.host}" is reached from other machines: set launch.network = "private" if only '
                "machines that you trust are in that network"
            )
        if not isinstance(self.hosts, str) and NEWCOMER in self.hosts:
            return f"launch.hosts = {self.hosts}: `{NEWCOMER}` stands for hosts that join later, take another name"
        if len({*self.agents}) < len(self.agents) or (not isinstance(self.hosts, str) and self.hosts[0] in self.agents):
            return f"launch.hosts = {self.hosts} names a host twice"
        if self.agents and 1.2 * self.agent_lease_s > self.heartbeat_timeout_s:
            return (
                f"launch.agent_lease_s = {self.agent_lease_s:g} needs a launch.heartbeat_timeout_s of at least "
                f"{1.2 * self.agent_lease_s:g}: below that, processes count as dead while their agent holds them"
            )
        return None


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class MetricsTable(Table):
    sinks: list[str] = []
    """Where metrics are written besides metrics.jsonl: `tensorboard`, `wandb`, `trackio` (optional extras), or
    `pkg.module:factory`."""
    samples_per_step: NonNegativeInt = 8
    """Rollout samples written to `samples/` per step."""


class ExpectedTable(Table):
    """Published or measured scores to show beside the run's own. Fractions in [0, 1]."""

    source: str
    """Where the scores come from."""
    machine: str
    """On what they were measured."""
    avg_at_n_first: float | None = None
    avg_at_n_last: float | None = None
    pass_at_k_first: float | None = None
    pass_at_k_last: float | None = None
    steps: int | None = None
    note: str | None = None
