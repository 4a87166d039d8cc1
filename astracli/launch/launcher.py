"""How the processes of a run come to life: the contract that the supervisor talks to. `local.py` starts them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from astracli.plan.types import ProcessPlan
from astracli.process.config import EngineConfig, ProcessConfig


@dataclass(frozen=True)
class Process:
    """One process of a run: what the plan says of it, and what it is told."""

    plan: ProcessPlan
    config: ProcessConfig
    env: Mapping[str, str] = field(default_factory=dict)
    """Set over the plan's: how the ranks of a trainer find each other."""

    @property
    def name(self) -> str:
        return self.plan.name

    def again(self) -> Process:
        """As it is started again by itself. An engine holds no weights of a training run then, and waits until they are
        staged and checked. Without a trainer nobody would stage any, and the model's own are right."""
        if isinstance(self.config, EngineConfig) and self.config.published:
            return replace(self, config=self.config.model_copy(update={"await_weights": True}))
        return self


class Started(Protocol):
    """A process that a launcher has started."""

    name: str
    log: Path
    """What it and earlier ones of its name in this attempt wrote to stdout and stderr."""

    def exited(self) -> bool: ...

    def exit_code(self) -> int:
        """Negative: the signal that ended it. Once it is stopped."""

    def last_lines(self, count: int = 20) -> list[str]:
        """End of what it wrote itself."""

    def log_time(self) -> float:
        """When it last wrote, in unix seconds: of several that died together, the first to fall silent died first."""

    def print_stacks(self) -> None:
        """Ask it to write every thread's stack to its log."""


class Launcher(Protocol):
    """Starts processes, watches their memory, and ends them with everything that they started."""

    def ready(self) -> bool:
        """Processes can be started. The first is not started before."""

    def has(self, host: str | None) -> bool:
        """Whether processes can be started on a host; None: the one where the supervisor is."""

    def newcomers(self) -> Sequence[Process]:
        """Processes of hosts that have joined since this was asked last."""

    def hosts(self) -> Mapping[str, str]:
        """Other hosts than this one -> whether their agent is there and what it runs, in words."""

    def gone(self, host: str) -> str:
        """Why nothing can be started there, in words."""

    def start(self, process: Process) -> Started: ...

    def stop(self, started: Sequence[Started], grace_s: float) -> None:
        """End them and what they left behind. `grace_s`: between asking and killing."""

    def stop_all(self) -> None:
        """No process that this launcher ever started is left running."""

    def close(self) -> None:
        """Stop all, and watch no more."""

    def usage(self) -> Mapping[str, tuple[int, int]]:
        """Name of a process -> bytes of memory and open descriptors, with what it started, as of about a second ago."""

    def memory(self) -> Mapping[str, Any]:
        """`{"peak_bytes", "kind", "peak_bytes_by_process"}` of the run so far."""
