"""What the hub is told and what it answers. Store, API and client share these; `wire` carries them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

PutStatus = Literal["accepted", "dropped", "duplicate", "unknown_lease", "stale"]
EngineState = Literal["ready", "updating", "down"]


class BadRequest(ValueError):
    """A request that the hub cannot make sense of. Answered with 400."""


HISTORY = 100
"""Steps whose groups keep a row each: they let people see what a run does."""
CURRICULUM_HISTORY = 1000
"""The same where prompts are chosen by the solve rates that are read from these rows."""


@dataclass(frozen=True)
class HubSettings:
    """What the store must know of the recipe and the plan."""

    batch_groups: int
    max_staleness: int
    drop_equal_groups: bool
    lease_timeout_s: float
    steps: int
    eval_every: int
    """0: no evaluation in the run."""
    engines: tuple[str, ...]
    """Those that serve evaluations, in the plan's order."""
    slots: int = 0
    """Requests that each engine decodes at once; 0: nobody asks for slots."""
    eval_slots: float = 0.5
    """Part of them that an evaluation gets while rollouts could use all."""
    deterministic: bool = False
    """Batches in the order of lease ids, leases in waves: nothing new is granted before every group of the wave before
    is in. Which groups are generated together, and so the last bits of their log-probabilities, then depends on nothing
    but their ids. Needs staleness 0."""
    consume: Literal["edf", "fifo"] = "edf"
    replay_ratio: int = 0
    history_steps: int = HISTORY
    """Steps whose groups keep a row each."""
    max_dropped_batches: int = 0
    """Batches' worth of groups in a row without signal after which the run ends; 0: never."""
    checkpoints: bool = True
    """Without them nothing is kept for a resume: what a step was trained on goes with the next one."""
    gpu_leases: tuple[str, ...] = ()
    own_batches: bool = False
    """The trainer makes its batches itself, of a data set: a step is written down when it is acknowledged, without
    groups."""
    checkpoint_every: int = 0
    """Not 0: an evaluation that has waited takes only a version that has a checkpoint, which is so every n-th step, at
    steps at which an evaluation is due, and at the last."""

    def __post_init__(self) -> None:
        assert not (self.deterministic and self.max_staleness), "deterministic runs have staleness 0"


class _Answer:
    """A document with exactly the keys of its class."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Lease(_Answer):
    lease_id: int
    prompt_index: int
    """The prompt's place in the endless sequence of prompts."""


@dataclass(frozen=True)
class Leases(_Answer):
    leases: list[Lease]
    wait: str | None
    """What is waited for when there are none."""
    stop: bool


@dataclass(frozen=True)
class BatchStats(_Answer):
    """Everything that came in while its step was the next one, dropped groups included."""

    arrived_groups: int
    dropped_groups: int
    expired_groups: int
    reward_mean: float | None
    """None when nothing came in."""
    tokens: int
    samples: int
    timeouts: int
    reward_errors: int
    """Samples whose grading failed."""
    parts: dict[str, float]
    """Mean of each named reward, and of what else rewards log, over the samples that have it."""
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of several training sources: `groups` and `reward_mean` of each."""
    no_answer: int = 0
    """Samples in which the grader found no answer."""
    truncated: int = 0
    """Samples cut off at the token limit."""


@dataclass(frozen=True)
class NoSignal(_Answer):
    """So many groups in a row were dropped that more of them will not help: what they were, and what came before."""

    groups: int
    batches: int
    """As many batches' worth."""
    samples: int
    truncated: int
    no_answer: int
    errors: int
    timeouts: int
    lowest: float
    """Mean reward of the group that earned least."""
    highest: float
    rewards: list[tuple[int, float]]
    """(step, mean reward of all that arrived for it), the first and the last steps that were trained."""
    prompts: list[int]
    """Places of some of the dropped groups' prompts in the sequence of prompts."""


@dataclass(frozen=True)
class Batch(_Answer):
    step: int
    groups: list[bytes]
    """As `rl.types.pack_group` makes them."""
    stats: BatchStats
    replay: int
    """How often these groups were trained on before."""


@dataclass(frozen=True)
class NextBatch(_Answer):
    batch: Batch | None
    wait: str | None = None
    save: bool = False
    """The first rank to the others: none will come, and the state is to become a checkpoint."""


@dataclass(frozen=True)
class Target(_Answer):
    version: int | None
    """What the engine should hold; None before the first version."""
    pinned: bool
    """An evaluation holds the engine at that version."""
    wanted: bool
    """Someone waits for the engine's GPU lease, and no evaluation is pinned to it."""
    down: bool
    """The engine was lost, and has not been reported since."""
    stop: bool


@dataclass(frozen=True)
class SlotLimit(_Answer):
    limit: int
    """Slots of the engine that the asker may hold at once."""
    shared: bool
    """Another uses the engine, too: what is held and wanted is to be told again soon."""


@dataclass(frozen=True)
class GpuLeaseReply(_Answer):
    held: bool
    stop: bool


@dataclass(frozen=True)
class Evaluation(_Answer):
    """An evaluation that runs."""

    step: int
    version: int
    due_step: int
    """The step at which it became due; below `step` when an earlier evaluation was still running then."""
    served: bool = False
    """Every sample is on disk; what is left are the results."""


@dataclass(frozen=True)
class NextEvaluation(_Answer):
    evaluation: Evaluation | None
    wait: str | None
    stop: bool


@dataclass(frozen=True)
class Holders(_Answer):
    engines: list[str]
    """Those that can be asked for the evaluation now."""
    stop: bool


@dataclass(frozen=True)
class EngineReport(_Answer):
    """The last report of an engine, or the note that it was lost."""

    version: int | None
    state: EngineState

    def __post_init__(self) -> None:
        if self.state == "ready" and self.version is None:
            raise BadRequest("an engine that is `ready` has a version")


@dataclass(frozen=True)
class EvaluationStatus(_Answer):
    due_step: int
    step: int | None
    """None, as the version, while it waits for an earlier one."""
    version: int | None
    state: Literal["waiting", "running", "done"]
    results: Any


@dataclass(frozen=True)
class GpuLeaseStatus(_Answer):
    holder: str | None
    waiting: list[str]


@dataclass(frozen=True)
class Counts(_Answer):
    """Groups by fate, those included whose rows are deleted; `timeouts` and `reward_errors` count samples."""

    in_flight: int = 0
    queued: int = 0
    waiting: int = 0
    dropped: int = 0
    expired: int = 0
    skipped: int = 0
    timeouts: int = 0
    reward_errors: int = 0
    consumed_steps: int = 0
    consumed_groups: int = 0
    replayed_steps: int = 0


@dataclass(frozen=True)
class HubState(_Answer):
    """Everything that the terminal and the reports show of the hub."""

    steps: int
    next_step: int
    latest_version: int | None
    counts: Counts
    dropped_in_a_row: int
    skipped_in_a_row: int
    engines: dict[str, EngineReport]
    evals: list[EvaluationStatus]
    gpu_leases: dict[str, GpuLeaseStatus]
    finished: bool
    stop: bool

    def done_evals(self) -> list[EvaluationStatus]:
        """In the order of their steps."""
        return [one for one in self.evals if one.results]
