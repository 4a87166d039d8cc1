"""Runs that a queue starts: the job of a run, submitting it, what became of it, and queueing it once more."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from astracli.config import reading
from astracli.config.recipe import Recipe
from astracli.errors import AstraError, RunFailed, UserError
from astracli.launch.clusters import registry as clusters
from astracli.launch.clusters.contract import Job, Queue
from astracli.plan import hosts
from astracli.plan.types import LaunchPlan
from astracli.process.atomic import write_atomic
from astracli.process.console import say
from astracli.runs.run_dir import RunDir


def text(recipe: Recipe, plan: LaunchPlan, run: Path) -> str | None:
    """What would be submitted for a run that lies in `run`; None: it would run in the process that was asked."""
    queue = clusters.queue(recipe)
    return queue.text(recipe, plan, run) if queue is not None else None


def refuse(recipe: Recipe, plan: LaunchPlan) -> None:
    """Raise UserError for what no machine of the queue would mend; the job itself judges its machines."""
    for problem in hosts.problems(recipe, plan.processes):
        raise UserError(problem.message, problem.hint)


def submit(queue: Queue, recipe: Recipe, plan: LaunchPlan, run: RunDir) -> Job:
    """Write the job of a run that lies ready, and hand it over. Raises UserError."""
    cluster = clusters.of(recipe)
    assert cluster is not None
    if (before := of(run)) is not None and state(before) is not None:
        raise UserError(
            f"job {before.ident} of run `{run.path}` is queued or runs already: {state(before)}",
            f"`astra runs stop {run.path}` ends it",
        )
    run.logs.mkdir(parents=True, exist_ok=True)
    file = run.path / queue.file
    write_atomic(file, queue.text(recipe, plan, run.path.resolve()))
    job = Job(cluster.name, queue.submit(file), str(file))
    write_atomic(run.job_json, json.dumps(asdict(job), indent=1) + "\n")
    say(f"submitted {cluster.name} job {job.ident}, {file}: it starts run {run.path}")
    say(f"`astra runs status {run.path}` says where it stands, `astra runs stop {run.path}` ends it")
    return job


def of(run: RunDir) -> Job | None:
    """The newest job of a run; None: no queue starts it."""
    try:
        return Job(**reading.document(run.job_json))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"`{run.job_json}` is damaged: {error}", "remove it: the run itself does not need it") from None


def state(job: Job) -> str | None:
    """In words; None when its queue does not know it any more. Raises UserError when that cannot be asked."""
    return _queue(job).state(job.ident)


def words(job: Job) -> str:
    """For people, whatever happens."""
    with contextlib.suppress(AstraError):
        return f"{job.cluster} {job.ident}: {state(job) or 'over'}"
    return f"{job.cluster} {job.ident}: its queue does not answer from here"


def goes_on(job: Job) -> bool:
    """Whether the queue has it, as far as that can be asked."""
    with contextlib.suppress(AstraError):
        return state(job) is not None
    return False


def stop(job: Job) -> None:
    """Raises UserError."""
    _queue(job).stop(job.ident)


def again(recipe: Recipe, run: RunDir) -> None:
    """The run was told to end before its time, with a checkpoint: queue its job once more."""
    cluster = clusters.of(recipe)
    if cluster is None or cluster.queue is None or not cluster.queue.inside():
        return
    try:
        ident = cluster.queue.again(recipe)
    except RunFailed as error:
        say(f"warning: {error.message}; go on with `astra {recipe.command} --resume {run.path}`")
        return
    if ident is not None:
        say(f"job {ident} is queued once more: it goes on from the checkpoint")


def _queue(job: Job) -> Queue:
    queue = clusters.get(job.cluster).queue
    if queue is None:
        raise UserError(f"cluster `{job.cluster}` has no queue", "job.json of the run names another one")
    return queue
