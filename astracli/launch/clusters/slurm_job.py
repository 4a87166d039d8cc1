"""A Slurm job that holds a run: its file, submitting it, its state, its end, and queueing it again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from astracli.config.recipe import Recipe
from astracli.errors import RunFailed, UserError
from astracli.plan.types import LaunchPlan
from astracli.runs.run_dir import JOB_LOG

if TYPE_CHECKING:
    from astracli.launch.clusters.slurm import SlurmTable

ABOUT = "# Written by `astra train`, for `sbatch`. Starts the run, and goes on with it when it is queued again."
ANSWER_S = 60.0
ENDING_S = 20.0
"""Kept back, of the time before the limit, for everything to end."""


def table(recipe: Recipe) -> SlurmTable:
    return cast("SlurmTable", recipe.slurm)  # type: ignore[attr-defined]


class SlurmQueue:
    file = "job.sbatch"

    def inside(self) -> bool:
        return "SLURM_JOB_ID" in os.environ

    def text(self, recipe: Recipe, plan: LaunchPlan, run: Path) -> str:
        asked = table(recipe)
        options = [
            f"--job-name=astra-{run.name}",
            f"--chdir={Path.cwd()}",
            f"--output={str(run / 'logs' / JOB_LOG).replace('%', '%%')}",
            "--open-mode=append",
            f"--nodes={asked.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={_threads(plan)}",
        ]
        gpus = max((len(each) for each in _gpus(plan).values()), default=0)
        options += [f"--gpus-per-node={gpus}"] if gpus else []
        for name in ("partition", "time", "account"):
            value = getattr(asked, name)
            options += [f"--{name}={value}"] if value is not None else []
        options += ["--no-kill"] if asked.nodes > 1 else []
        options += ["--requeue", f"--signal=B:USR1@{asked.signal_s}"] if asked.requeue else ["--no-requeue"]
        lines = [_option(line) for line in (*options, *asked.lines)]
        command = shlex.join([*astra(), recipe.command, "--resume", str(run)])
        return "\n".join(["#!/bin/bash", ABOUT, *lines, "", *asked.setup, f"exec {command}", ""])

    def submit(self, file: Path) -> str:
        try:
            return ask("sbatch", "--parsable", str(file)).strip().partition(";")[0]
        except UserError as error:
            raise UserError(error.message, f"the file is `{file}`; its options come from the table [slurm]") from None

    def state(self, ident: str) -> str | None:
        try:
            found = ask("squeue", "--noheader", f"--jobs={ident}", "--states=all", "--format=%T %r %N")
        except UserError as error:
            if "invalid job id" in error.message.lower():
                return None
            raise
        name, _, rest = found.strip().partition(" ")
        if not name or name in ENDED:
            return None
        reason, _, nodes = rest.partition(" ")
        more = [f"on {nodes.strip()}" if nodes.strip() else "", reason if reason != "None" else ""]
        return ", ".join(filter(None, [name.lower(), *more]))

    def stop(self, ident: str) -> None:
        running = (self.state(ident) or "").startswith("running")
        ask("scancel", *(["--signal=TERM", "--batch"] if running else []), ident)

    def save_s(self, recipe: Recipe) -> float | None:
        return table(recipe).signal_s - min(ENDING_S, table(recipe).signal_s / 4) if self.inside() else None

    def again(self, recipe: Recipe) -> str | None:
        if not table(recipe).requeue:
            return None
        ident = os.environ["SLURM_JOB_ID"]
        try:
            ask("scontrol", "requeue", ident)
        except UserError as error:
            raise RunFailed(f"job {ident} could not be queued again: {error.message}") from None
        return ident


ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip


def ask(*words: str) -> str:
    """What one of Slurm's commands prints. Raises UserError with its last line."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise UserError(f"there is no `{words[0]}` on this machine", "Slurm's commands must be in the PATH") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"`{words[0]}` did not answer within {ANSWER_S:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"`{words[0]}` failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def node_address(node: str) -> str:
    """Where a node is reached. Raises UserError."""
    found = re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "show", "node", node))
    return found[1] if found else node


def astra() -> list[str]:
    """The command on every node: environments lie on a file system that the nodes share."""
    script = Path(sys.executable).with_name("astra")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "astracli"]


def _gpus(plan: LaunchPlan) -> dict[str | None, set[int]]:
    """By host."""
    found: dict[str | None, set[int]] = {}
    for process in plan.processes:
        found.setdefault(process.host, set()).update(process.gpus)
    return found


def _threads(plan: LaunchPlan) -> int:
    """Of the processes on the fullest node."""
    count: Counter[str | None] = Counter()
    for process in plan.processes:
        count[process.host] += process.threads
    return max(count.values(), default=1)


def _option(text: str) -> str:
    """A line of the file; a value with a blank is quoted."""
    name, equals, value = text.partition("=")
    quoted = f'"{value}"' if " " in value and not value.startswith('"') else value
    return f"#SBATCH {name}{equals}{quoted}"
