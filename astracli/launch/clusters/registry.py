"""Which clusters are installed, which one a recipe asks for, and what a start asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from astracli.config import doors
from astracli.config.recipe import Recipe
from astracli.config.recipe_clusters import GROUP, LISTED, LOCAL
from astracli.config.recipe_run import is_loopback
from astracli.errors import UserError
from astracli.launch.clusters.contract import Cluster, Queue
from astracli.machine.findings import Check
from astracli.plan.types import TRAINING, Command

HOW_TO_ADD = (
    f"a cluster is a package with an entry point in `{GROUP}` that names an `astracli.launch.clusters.contract.Cluster`"
)


@cache
def installed() -> tuple[doors.Installed[Cluster], ...]:
    """Every cluster of this environment, by name; broken ones carry their error."""
    return tuple(doors.installed(GROUP, Cluster))


@cache
def get(name: str) -> Cluster:
    """The cluster of that name. Raises UserError."""
    return doors.get(installed(), name, "cluster", HOW_TO_ADD)


def of(recipe: Recipe) -> Cluster | None:
    """What `launch.hosts` names; None: everything runs here. Raises UserError."""
    hosts = recipe.launch.hosts
    if not isinstance(hosts, str):
        return get(LISTED)
    return None if hosts == LOCAL else get(hosts)


def check(recipe: Recipe, command: Command) -> None:
    """Whether the recipe's hosts can be had. Raises UserError."""
    cluster = of(recipe) if command in TRAINING else None
    if cluster is None:
        return
    if command != "train" and recipe.agents:
        raise UserError(
            f"`astra {command}` runs on one host, and launch.hosts asks for {1 + len(recipe.agents)}",
            "leave launch.hosts out, or ask for one",
        )
    cluster.check(recipe)
    if queue(recipe) is None:
        addressed(recipe)


def addressed(recipe: Recipe) -> Recipe:
    """With the address where other hosts of the cluster find the hub. Raises UserError."""
    cluster = of(recipe)
    host = cluster.address(recipe) if cluster is not None else recipe.launch.host
    if host == recipe.launch.host:
        return recipe
    if not is_loopback(host) and recipe.launch.network != "private":
        raise UserError(
            f"the other hosts reach this one at {host}, beyond this machine, and launch.network = "
            f'"{recipe.launch.network}"',
            "`--set launch.network=private` if only machines that you trust are in that network: nothing is encrypted",
        )
    return recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"host": host})})


def queue(recipe: Recipe) -> Queue | None:
    """What takes a training run of this recipe that is started here; None: it runs in this process."""
    cluster = of(recipe)
    found = cluster.queue if cluster is not None else None
    return found if found is not None and not found.inside() else None


def findings(recipe: Recipe | None) -> Iterator[Check]:
    """Lines of `astra doctor` about the recipe's cluster; without a recipe, about each that is there."""
    if recipe is not None:
        cluster = of(recipe)
        yield from cluster.checks(recipe) if cluster is not None else ()
        return
    for item in installed():
        if item.plugin is not None:
            yield from item.plugin.checks(None)
