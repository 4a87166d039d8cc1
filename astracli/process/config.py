"""What each process of a run is told: one frozen, typed document per role, RUN_DIR/config/NAME.json.

Only a `role` has a default. A document with a missing key, an unknown key or a wrong type is refused where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from astracli.config.recipe import Recipe
from astracli.config.recipe_run import Table
from astracli.errors import UserError
from astracli.process.layout import Split, Staging


class Role(StrEnum):
    """What a process of a run does."""

    ENGINE = "engine"
    ROLLOUT = "rollout"
    TRAINER = "trainer"
    EVAL = "eval"


Device = Literal["cpu", "cuda"]


class EngineAddress(Table):
    """Where other processes of the run reach an engine."""

    name: str
    url: str
    stage_dir: Path
    """Where payloads for it are staged."""
    token: str | None = Field(default=None, repr=False)
    """What it asks of its callers; None: the token of the caller's own config."""


Keep = Literal["all", "right"]


class SampleFile(Table):
    """What a rollout without a trainer writes."""

    path: Path
    """One JSON line a sample."""
    groups: int
    """How many are generated; then the process ends."""
    keep: Keep = "all"
    """Which samples are written."""


class ProcessConfig(Table):
    """What every process is told."""

    role: Role
    name: str
    """Unique in the run: `engine0`, `rollout`, `trainer`, `trainer1`, `eval`."""
    run_dir: Path
    attempt: int
    """1 for a new run, one more for each `--resume`."""
    hub_url: str
    token: str = Field(repr=False)
    """Bearer token of the run; every request between its processes carries it."""
    recipe: Recipe
    model_path: Path
    engine: str
    """Name of the run's engine."""
    threads: int
    """CPU threads of this process."""

    @classmethod
    def largest(cls) -> int:
        return 2**63 - 1


class EngineConfig(ProcessConfig):
    role: Literal[Role.ENGINE] = Role.ENGINE
    device: Device
    port: int
    stage_dir: Path
    published: bool
    """A trainer of this run brings every version, the first included."""
    await_weights: bool
    """It serves nothing before a version is staged and checked: it is started again, and the run has other weights than
    the model's own."""
    time_sharing: bool
    """It gives its memory back while a trainer uses its GPU."""
    mem_fraction_static: float
    """What it reserves of its GPU."""
    staging: Staging
    """Where a full version waits until its pause."""
    serving_attention: str
    linear_attention: str
    prefix_cache: bool
    """It keeps keys and values of prompts for later requests."""


class RolloutConfig(ProcessConfig):
    role: Literal[Role.ROLLOUT] = Role.ROLLOUT
    data_paths: dict[str, Path | None]
    """Of each source by name ("" of a single one). None: its problems are generated."""
    engines: tuple[EngineAddress, ...]
    gpu_leases: tuple[str, ...]
    """Engines that share their GPU with a trainer in time."""
    samples: SampleFile | None
    """None: groups go to a trainer."""
    generates: bool
    """False: it leases no prompts, and only brings versions into the engines, for evaluations."""


class TrainerConfig(ProcessConfig):
    role: Literal[Role.TRAINER] = Role.TRAINER
    device: Device
    engines: tuple[EngineAddress, ...]
    attention: str
    gdn_backward: str
    resume_step: int | None
    """Steps that the checkpoint to go on from has trained, to which the hub has been rewound; 0: none was written yet.
    None for a new run."""
    initial: Path | None
    """Checkpoint of another run, whose masters and moments a new run starts with; None: the model's weights alone."""
    start: int
    """How often the supervisor has started the run again from a checkpoint in this attempt."""
    split: Split
    shared: bool
    """Some GPU holds an engine and a trainer: this process waits until the engines have reserved their part."""
    gpu_leases: tuple[str, ...]
    """Engines with which the trainer shares GPUs in time; their names are the leases'."""
    leaves: bool
    """One of them uses this rank's own GPU."""
    warm_up: bool
    """Made-up rows are computed before the first batch, so that kernels are compiled while the engines start."""
    teacher_path: Path | None
    """Checkpoint of the teacher that the algorithm asks for."""
    data_paths: dict[str, Path | None]
    """In supervised training, examples of each source by name; None: they are generated."""
    host_bytes: int
    """What all processes are planned to need of the host, without copies of checkpoints; 0 on a CPU."""


class EvalConfig(ProcessConfig):
    role: Literal[Role.EVAL] = Role.EVAL
    engines: tuple[EngineAddress, ...]
    benchmarks: dict[str, Path | None]
    """Local copy of each; None: it is generated."""
    out: Path | None
    """Evaluate once, on whatever the engines serve, write here and end. None: follow the hub of a training run."""


C = TypeVar("C", bound=ProcessConfig)


def load_config(argv: Sequence[str], kind: type[C]) -> C:
    """Read CONFIG.json named by the only argument. `argv` is `sys.argv`. Raises UserError."""
    if len(argv) != 2:
        raise UserError("a worker takes one argument, its CONFIG.json", "workers are started by `astra train`")
    path = Path(argv[1])
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read worker config `{path}`: {error.strerror}") from None
    except ValidationError as error:
        wrong = [f"`{'.'.join(map(str, item['loc']))}`: {item['msg']}" for item in error.errors(include_url=False)]
        raise UserError(f"`{path}` is no {kind.__name__}: {'; '.join(wrong)}") from None
