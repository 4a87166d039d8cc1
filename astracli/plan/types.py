"""What a launch plan is made of: processes, problems, tables. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from astracli.backends.choice import BackendChoice
from astracli.machine.findings import PlanProblem
from astracli.machine.memory import MemoryRow
from astracli.plan.gpus import Margin
from astracli.plan.placement import Placement
from astracli.process.config import Role

Command = Literal["train", "sft", "rollout", "eval"]
TRAINING: frozenset[str] = frozenset({"train", "sft"})
"""Commands with a trainer."""


@dataclass(frozen=True)
class ProcessPlan:
    """One child of the supervisor."""

    name: str
    role: Role
    module: str
    gpus: tuple[int, ...]
    """Indexes as nvidia-smi counts them; () = none."""
    threads: int
    nice: int
    restarts: int
    env: Mapping[str, str]
    """Set over the supervisor's environment."""
    python: str | None = None
    """Interpreter of its own environment; None = the supervisor's."""
    rank: int = 0
    world_size: int = 1
    children: int = 0
    """Grading processes that it starts itself."""
    host: str | None = None
    """Where an agent starts it, by its name in `launch.hosts`; None: on the first host, where the supervisor is."""


@dataclass(frozen=True)
class LaunchPlan:
    recipe: str
    command: Command
    choice: BackendChoice
    processes: tuple[ProcessPlan, ...]
    memory: tuple[MemoryRow, ...]
    disk: tuple[MemoryRow, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the model and of a step; empty when no config is known."""
    placement: Placement = field(default_factory=Placement)
    """What lies where on GPUs and host, and why."""
    gpu_sizes: Mapping[int, int] = field(default_factory=dict)
    """Bytes of every GPU that the machine shows, as far as the recipe may use them."""
    gpu_share: float = 1.0
    """Of each card's memory, what the recipe may use."""
    host_size: int = 0
    """Bytes of the host's memory."""
    running_requests: int = 0
    """Of each engine: the recipe's `rollout.max_running_requests`, or what was derived for it."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Published figures of the recipe."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What the recipe says of prompts, in words."""
    margins: tuple[Margin, ...] = ()
    """Of each GPU whose size is known."""
    problems: tuple[PlanProblem, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """What this machine lacks, in short."""
        return [problem.what for problem in self.problems]

    @property
    def gpu_leases(self) -> list[str]:
        """Engines that share their GPU in time with a trainer: each has a GPU lease at the hub."""
        if not self.placement.time_sharing:
            return []
        trained = {gpu for process in self.processes if process.role is Role.TRAINER for gpu in process.gpus}
        return [p.name for p in self.processes if p.role is Role.ENGINE and trained & set(p.gpus)]

    @property
    def gpu_map(self) -> dict[int, list[str]]:
        """GPU index -> names of the processes on it."""
        result: dict[int, list[str]] = {}
        for process in self.processes:
            for gpu in process.gpus:
                result.setdefault(gpu, []).append(process.name)
        return dict(sorted(result.items()))
