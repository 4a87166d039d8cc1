"""Slurm: `astra train` submits one job; in it `srun` starts an agent on each further node.

The first node of the job has the supervisor. Before the time limit Slurm sends SIGUSR1 to it: a checkpoint is made, and
the job is queued again under its number, as `astra train --resume`.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from astracli.config.recipe import Recipe
from astracli.config.recipe_clusters import ClusterTable
from astracli.config.recipe_run import is_loopback
from astracli.errors import UserError
from astracli.launch.clusters import slurm_job
from astracli.launch.clusters.command import CommandAgent
from astracli.launch.clusters.contract import CHECKS, AgentCall, Cluster, Hosts
from astracli.machine.findings import Check
from astracli.plan.types import LaunchPlan


class SlurmTable(ClusterTable):
    """The job that `astra train` submits with `launch.hosts = "slurm"`."""

    partition: str | None = None
    """None: the cluster's default."""
    time: str | None = Field(default=None, pattern=r"^[0-9]+([:-][0-9]+)*$")
    """Time limit as Slurm reads it, such as `08:00:00` or `1-12`. None: that of the partition."""
    account: str | None = None
    """What the job is charged to."""
    lines: list[str] = Field(default=[])
    """Further options of the job, such as `["--qos=high", "--mem=64G"]`. They come last and go before the file's own,
    among these `--cpus-per-task`, the threads of the plan on its fullest node, and `--gpus-per-node`."""
    setup: list[str] = Field(default=[])
    """Lines of shell before astra starts, such as `["module load cuda"]`."""
    requeue: bool = True
    """Before the time limit, make a checkpoint and queue the job again."""
    signal_s: int = Field(default=300, ge=30, le=65535)
    """How many seconds before the limit. A step, and then a checkpoint, must be over within them."""


class Slurm(Cluster):
    name = "slurm"
    settings = SlurmTable
    queue = slurm_job.SlurmQueue()

    def check(self, recipe: Recipe) -> None:
        table = slurm_job.table(recipe)
        if table.requeue and not recipe.checkpoint.every:
            raise UserError(
                "slurm.requeue with checkpoint.every = 0: the job would begin anew each time its limit comes",
                "`--set checkpoint.every=10`, or `--set slurm.requeue=false`",
            )
        if table.nodes > 1 and recipe.launch.network != "private":
            raise UserError(
                f'slurm.nodes = {table.nodes}, and launch.network = "{recipe.launch.network}" keeps to one machine',
                "`--set launch.network=private` if only machines that you trust are in it: nothing is encrypted",
            )
        if self.queue.inside():
            there = len(_nodes())
            if there < table.nodes:
                raise UserError(
                    f"slurm.nodes = {table.nodes}, and job {os.environ['SLURM_JOB_ID']} has {there}",
                    f"`--set slurm.nodes={there}`; outside of a job, `astra train` submits one of the right size",
                )
        elif shutil.which("sbatch") is None:
            raise UserError(
                "there is no `sbatch` on this machine: a job cannot be submitted",
                "give the command on a login node of the cluster; `--dry-run` shows the file anywhere",
            )

    def checks(self, recipe: Recipe | None) -> Iterator[Check]:
        bad = "fail" if recipe is not None else "skip"
        if shutil.which("sbatch") is None:
            if recipe is not None:
                yield Check("slurm", CHECKS, "fail", "no `sbatch` here", "it submits the job", "use a login node")
            return
        try:
            partitions = slurm_job.ask("sinfo", "--noheader", "--format=%P %a %D %l").splitlines()
        except UserError as error:
            why = "the job is submitted to it"
            yield Check("slurm", CHECKS, bad, error.message, why, "look at `sinfo`")  # type: ignore[arg-type]
            return
        rows = [line.split() for line in partitions if len(line.split()) == 4]
        words = "; ".join(f"{name} {state}, {nodes} nodes, limit {limit}" for name, state, nodes, limit in rows)
        yield Check("slurm", CHECKS, "ok", f"partitions: {words or 'none'}")
        if recipe is None:
            return
        table, known = slurm_job.table(recipe), {row[0].rstrip("*") for row in rows}
        if table.partition is not None and not {*table.partition.split(",")} <= known:
            names = ", ".join(sorted(known)) or "none"
            value = f"no `{table.partition}` (there is: {names})"
            yield Check("partition", CHECKS, "fail", value, "slurm.partition names it", "name one of these")
        try:
            self.check(recipe)
        except UserError as error:
            yield Check("job", CHECKS, "fail", error.message, "the run would be refused", error.hint or "")

    def address(self, recipe: Recipe) -> str:
        others = _nodes()[1 : slurm_job.table(recipe).nodes] if self.queue.inside() else []
        if not others or not is_loopback(recipe.launch.host):
            return recipe.launch.host
        where = slurm_job.node_address(others[0])
        try:
            with socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((where, 9))
                return str(probe.getsockname()[0])
        except OSError as error:
            raise UserError(
                f"node `{others[0]}` ({where}) is not known here: {(error.strerror or str(error)).lower()}",
                "set launch.host to the address of this node",
            ) from None

    def open(self, recipe: Recipe, plan: LaunchPlan) -> Hosts | None:
        return SlurmHosts(dict(zip(recipe.agents, _nodes()[1:], strict=False)))


class SlurmHosts:
    """The nodes of this job."""

    def __init__(self, nodes: dict[str, str]):
        self._nodes = nodes
        """Name of a host in the run -> its node."""

    def start(self, host: str, call: AgentCall, log: Path) -> CommandAgent:
        step = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={self._nodes[host]}", "--overlap", "--export=ALL"]
        step += ["--kill-on-bad-exit=0", f"--job-name=agent-{host}"]
        return CommandAgent([*step, *slurm_job.astra(), *call.words], call.token, log)

    def awaited(self, host: str) -> str:
        return f"its agent on node {self._nodes[host]} is awaited"

    def lost(self, host: str) -> bool:
        return False

    def arrivals(self) -> Sequence[str]:
        return ()

    def close(self) -> None:
        return


def _nodes() -> list[str]:
    """Of this job, the one of this process first. Raises UserError."""
    names = slurm_job.ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    here = os.environ.get("SLURMD_NODENAME", names[0])
    return [here, *(name for name in names if name != here)]


CLUSTER = Slurm()
