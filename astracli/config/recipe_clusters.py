"""Tables that clusters bring into a recipe: `[NAME]` for each entry point in the group `astra.clusters`."""

from __future__ import annotations

from pydantic import PositiveInt

from astracli.config import doors
from astracli.config.recipe_run import Table

GROUP = "astra.clusters"
LOCAL = "local"
"""`launch.hosts` of a run on this machine alone."""
LISTED = "ssh"
"""The cluster of a run whose hosts are named one by one."""


class ClusterTable(Table):
    """Base of the table of a cluster that `launch.hosts` can name."""

    nodes: PositiveInt = 1
    """Hosts of the run. The first has the supervisor, the trainer and the evaluation worker, and with one node the
    engines too; with more, engines are on the others."""


def tables() -> dict[str, type[Table]]:
    """Name of a cluster -> its table."""
    return doors.settings(GROUP)


def names() -> list[str]:
    """What `launch.hosts` may be, other than a list."""
    return [LOCAL, *(name for name in doors.names(GROUP) if name != LISTED)]


def nodes(count: int) -> list[str]:
    """How the hosts of a cluster are called in messages, logs and files."""
    return [f"node{number}" for number in range(count)]
