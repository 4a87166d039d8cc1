"""Ray: one actor a node runs an agent there. Ray places the agents; nothing of the run passes through it.

The command is given on a node of the Ray cluster, which has the supervisor and the trainer. A placement group reserves
the other nodes; a node that comes later, of the autoscaler for example, gets an agent of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from astracli.config.recipe import Recipe
from astracli.config.recipe_clusters import ClusterTable
from astracli.config.recipe_run import is_loopback
from astracli.errors import UserError
from astracli.launch.clusters.contract import CHECKS, AgentCall, AgentEnd, Cluster, Hosts
from astracli.machine.findings import Check
from astracli.plan.types import LaunchPlan

LOOK_S = 2.0
"""Between two times at which Ray is asked for its nodes."""
END_S = 20.0
OTHER_NODE = "ray.io/node-id"
"""Label that every node has: its id."""


class RayTable(ClusterTable):
    """Where agents run with `launch.hosts = "ray"`."""

    address: str = Field(default="auto", min_length=1)
    """Of the Ray cluster. `auto`: the one that this machine is a node of."""
    cpus: PositiveFloat | None = None
    """CPUs that an agent reserves on its node. None: the threads of the plan on its fullest node."""
    max_nodes: PositiveInt | None = None
    """Nodes that join while the run goes on are taken up to so many in all, the first included. None: all of them. The
    autoscaler is asked for `nodes`, not for more."""


class Ray(Cluster):
    name = "ray"
    settings = RayTable

    def check(self, recipe: Recipe) -> None:
        table, ray = _own(recipe), connected(_own(recipe))
        if table.max_nodes is not None and table.max_nodes < table.nodes:
            raise UserError(f"ray.max_nodes = {table.max_nodes} is below ray.nodes = {table.nodes}")
        if _node_here(ray) is None:
            raise UserError(
                "this machine is no node of the Ray cluster, and the hub of the run must be reached from its nodes",
                "give the command on a node of it, its head for example",
            )

    def checks(self, recipe: Recipe | None) -> Iterator[Check]:
        if recipe is None:
            return
        try:
            ray = connected(_own(recipe))
            self.check(recipe)
        except UserError as error:
            yield Check("ray", CHECKS, "fail", error.message, "it starts the agents", error.hint or "")
            return
        alive = [node for node in ray.nodes() if node["Alive"]]
        cpus = sum(node["Resources"].get("CPU", 0) for node in alive)
        there, asked = len(alive), _own(recipe).nodes
        words = f"Ray {ray.__version__}, {there} node{'s' * (there != 1)}, {cpus:g} CPUs"
        if there < asked:
            why = "the run waits for the others, until launch.ready_timeout_s"
            yield Check(
                "ray", CHECKS, "warn", f"{words}; ray.nodes = {asked}", why, "add nodes, or let Ray's autoscaler"
            )
        else:
            yield Check("ray", CHECKS, "ok", words)

    def address(self, recipe: Recipe) -> str:
        if not recipe.agents or not is_loopback(recipe.launch.host):
            return recipe.launch.host
        here = _node_here(connected(_own(recipe)))
        return str(here["NodeManagerAddress"]) if here is not None else recipe.launch.host

    def open(self, recipe: Recipe, plan: LaunchPlan) -> Hosts | None:
        table = _own(recipe)
        count: Counter[str | None] = Counter()
        for process in plan.processes:
            count[process.host] += process.threads
        fullest = max((threads for host, threads in count.items() if host is not None), default=1)
        return RayHosts(connected(table), recipe.agents, table.cpus or float(fullest), table.max_nodes)


@dataclass
class RayAgent:
    """An actor that runs an agent."""

    ray: Any
    actor: Any
    result: Any
    """Of its `run`."""
    node: Any
    """Of its `node`."""
    log: Path

    def ended(self) -> AgentEnd | None:
        if not self.ray.wait([self.result], timeout=0)[0]:
            return None
        try:
            code, lines = self.ray.get(self.result)
        except self.ray.exceptions.RayError as error:  # its node is lost, or it could not be made there
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            code, lines = 1, said or [type(error).__name__]
        with self.log.open("a", encoding="utf-8") as log:
            log.writelines(f"{line}\n" for line in lines)
        said = [line for line in lines if line.startswith("error: ")] or lines[:1]
        return AgentEnd(code, said[-1].removeprefix("error: ") if said else f"exit code {code}")

    def place(self) -> str | None:
        """Id of its node; None while Ray has none for it."""
        if not self.ray.wait([self.node], timeout=0)[0]:
            return None
        with contextlib.suppress(self.ray.exceptions.RayError):
            return str(self.ray.get(self.node))
        return None

    def end(self) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.actor.stop.remote()
            self.ray.wait([self.result], timeout=END_S if self.place() is not None else 0)
            self.ray.kill(self.actor)


class RayHosts:
    """The nodes of one run."""

    def __init__(self, ray: Any, planned: Sequence[str], cpus: float, max_nodes: int | None):
        self._ray, self._planned, self._cpus = ray, list(planned), cpus
        self._room = None if max_nodes is None else max_nodes - 1 - len(planned)
        """For how many nodes that come later; None: for all."""
        here = _node_here(ray)
        me = here["NodeID"] if here is not None else ""
        self._seen = {node["NodeID"] for node in ray.nodes()}
        self._bundle = {host: index for index, host in enumerate(planned)}
        self._on: dict[str, str] = {}
        """Host -> the node that it is."""
        self._agents: dict[str, RayAgent] = {}
        self._count = 1 + len(planned)
        self._looked = 0.0
        self._group = None
        if planned:
            groups = importlib.import_module("ray.util.placement_group")
            bundles, others = [{"CPU": cpus} for _ in planned], [{OTHER_NODE: f"!{me}"} for _ in planned]
            self._group = groups.placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=others)

    def start(self, host: str, call: AgentCall, log: Path) -> RayAgent:
        from astracli.launch.clusters.ray_actor import AgentActor

        strategies = importlib.import_module("ray.util.scheduling_strategies")
        if host in self._bundle:
            where = strategies.PlacementGroupSchedulingStrategy(self._group, self._bundle[host])
        else:
            where = strategies.NodeAffinitySchedulingStrategy(self._on[host], soft=False)
        made = self._ray.remote(AgentActor).options(
            num_cpus=self._cpus, max_concurrency=4, max_restarts=0, scheduling_strategy=where
        )
        actor = made.remote()
        agent = RayAgent(self._ray, actor, actor.run.remote(call.words, call.token), actor.node.remote(), log)
        self._agents[host] = agent
        return agent

    def awaited(self, host: str) -> str:
        agent = self._agents.get(host)
        if agent is None or agent.place() is not None:
            return ""
        return f"Ray has no further node with {self._cpus:g} free CPUs for it yet"

    def lost(self, host: str) -> bool:
        agent = self._agents.get(host)
        if agent is not None and (place := agent.place()) is not None:
            self._on[host] = place
        return host in self._on and self._on[host] in self._gone()

    def arrivals(self) -> Sequence[str]:
        """A node that is new, and the one on which Ray has put the place of a node that is lost."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return ()
        self._looked = now
        moved = [host for host in self._bundle if self.lost(host)]
        found = [self._named(bundle=self._bundle.pop(host)) for host in moved]
        places = {*self._on.values(), *self._reserved()}
        for node in self._ray.nodes():
            ident = node["NodeID"]
            if not node["Alive"] or ident in self._seen or ident in places:
                continue
            self._seen.add(ident)
            fits = node["Resources"].get("CPU", 0) >= self._cpus
            if fits and not moved and (self._room is None or self._room > 0):
                self._room = None if self._room is None else self._room - 1
                found.append(self._named(node=ident))
        return found

    def _named(self, bundle: int | None = None, node: str | None = None) -> str:
        host = f"node{self._count}"
        self._count += 1
        if bundle is not None:
            self._bundle[host] = bundle
        elif node is not None:
            self._on[host] = node
        return host

    def _reserved(self) -> list[str]:
        """Where the places of the group are."""
        if self._group is None:
            return []
        groups = importlib.import_module("ray.util.placement_group")
        return [str(node) for node in groups.placement_group_table(self._group)["bundles_to_node_id"].values()]

    def _gone(self) -> set[str]:
        return {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}

    def close(self) -> None:
        if self._group is not None:
            groups = importlib.import_module("ray.util.placement_group")
            with contextlib.suppress(self._ray.exceptions.RayError):
                groups.remove_placement_group(self._group)


def connected(table: RayTable) -> Any:
    """The package ray, connected to the cluster. Raises UserError."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise UserError('launch.hosts = "ray", and ray is not installed', "`pip install 'astracli[ray]'`") from None
    if not ray.is_initialized():
        try:
            ray.init(address=table.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"no Ray cluster is reached at ray.address = {table.address}: {said}",
                "start one with `ray start --head`, or join this machine to yours with `ray start --address=...`",
            ) from None
    return ray


def _own(recipe: Recipe) -> RayTable:
    table = CLUSTER.table(recipe)
    assert isinstance(table, RayTable)
    return table


def _node_here(ray: Any) -> dict[str, Any] | None:
    """The node of this process."""
    me = ray.get_runtime_context().get_node_id()
    return next((node for node in ray.nodes() if node["NodeID"] == me), None)


CLUSTER = Ray()
