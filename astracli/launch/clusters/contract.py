"""What a cluster is to a run: it starts `astra agent` on other hosts, and may have a queue for whole runs.

An entry point in the group `astra.clusters` names a `Cluster`; those of this package come in by the same door. A run
asks for one by its name in `launch.hosts`. A cluster places agents and carries no data of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from astracli.config.recipe import Recipe
from astracli.config.recipe_clusters import ClusterTable
from astracli.config.recipe_run import Table
from astracli.machine.findings import Check
from astracli.plan.types import LaunchPlan

CHECKS = "hosts"
"""Group of its lines in `astra doctor`."""
LEFT = 130
"""Exit code of an agent that was told to leave its run."""


@dataclass(frozen=True)
class AgentCall:
    """An agent that is to join a run."""

    url: str
    """Of the run's hub."""
    host: str
    """How its host is called in the run."""
    token: str = field(repr=False)
    """For its standard input: a command line can be read by every user of a machine."""

    @property
    def words(self) -> list[str]:
        """The command after `astra`."""
        return ["agent", self.url, "--token-file", "-", "--attached", "--name", self.host, "--wait", "60"]


@dataclass(frozen=True)
class AgentEnd:
    code: int
    words: str
    """How it ended, for people."""


class AgentProcess(Protocol):
    """An agent that was started on a host, as this machine sees it."""

    def ended(self) -> AgentEnd | None:
        """None while it runs, or while the cluster has no room for it yet."""

    def end(self) -> None:
        """End it, and return when it is gone or cannot be reached."""


class Hosts(Protocol):
    """The hosts of one run, while it goes on."""

    def start(self, host: str, call: AgentCall, log: Path) -> AgentProcess:
        """Start an agent on a host of the plan, or on one that arrived. What it writes goes to the end of `log`. Raises
        RunFailed."""

    def awaited(self, host: str) -> str:
        """What a host that is not there yet waits for, in words; "" for nothing but its agent."""

    def lost(self, host: str) -> bool:
        """Whether a host will not come back under its name."""

    def arrivals(self) -> Sequence[str]:
        """Hosts that came since this was asked last, beside those of the plan."""

    def close(self) -> None:
        """Every agent has ended."""


@dataclass(frozen=True)
class Job:
    """A run that was handed to a queue."""

    cluster: str
    ident: str
    file: str
    """What was submitted."""


class Queue(Protocol):
    """Where a cluster takes whole runs: `astra train` submits a job, and the job goes on with the run."""

    file: str
    """Name of the file in the run directory."""

    def inside(self) -> bool:
        """Whether this process runs in a job already."""

    def text(self, recipe: Recipe, plan: LaunchPlan, run: Path) -> str:
        """The file to submit: it starts the run that lies in `run`, and goes on with it when it is queued again."""

    def submit(self, file: Path) -> str:
        """-> the job's number. Raises UserError."""

    def state(self, ident: str) -> str | None:
        """Of a job, in words; None when the queue does not know it any more. Raises UserError when it does not say."""

    def stop(self, ident: str) -> None:
        """End a job that runs as Ctrl-C does; take one that waits out of the queue. Raises UserError."""

    def save_s(self, recipe: Recipe) -> float | None:
        """Seconds that a checkpoint may take after SIGUSR1, which tells a run that its time is nearly over."""

    def again(self, recipe: Recipe) -> str | None:
        """Queue the job of this process once more. -> its number; None: the recipe does not want it. Raises
        RunFailed."""


class Cluster:
    """Base of every cluster; each has one object, without state of a run."""

    name = ""
    settings: type[Table] = ClusterTable
    """Its table in a recipe, `[NAME]`; of a cluster that `launch.hosts` can name, a `ClusterTable`."""
    queue: Queue | None = None

    def check(self, recipe: Recipe) -> None:
        """Raise UserError for what the recipe or this machine lacks; agents are not started yet."""

    def checks(self, recipe: Recipe | None) -> Iterator[Check]:
        """Lines of `astra doctor`. Without a recipe only what is there by itself; nothing then fails."""
        yield from ()

    def address(self, recipe: Recipe) -> str:
        """Where the hub listens, in place of `launch.host`. Raises UserError."""
        return recipe.launch.host

    def open(self, recipe: Recipe, plan: LaunchPlan) -> Hosts | None:
        """Begin. None: agents are started by hand. Raises UserError."""
        raise NotImplementedError

    def table(self, recipe: Recipe) -> Table:
        """Its own settings."""
        own: Table = getattr(recipe, self.name)
        return own
