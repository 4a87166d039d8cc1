"""`astra runs stop`, `export` and `clean`: what changes a run, or what lies in its directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from astracli.cli.options import JsonOpt, OptionalRunArg, RootOpt, RunArg, complete_run, the_run
from astracli.cli.output import out
from astracli.errors import RunFailed, UserError

if TYPE_CHECKING:
    from astracli.launch.clusters.contract import Job
    from astracli.runs.run_dir import RunDir

CleanedRunArg = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="Run name or directory; default all that are done.", autocompletion=complete_run
    ),
]
STOP_WAIT_S = 10.0
JOB_STOP_WAIT_S = 60.0
"""Its queue takes a few seconds, and agents of other hosts end too."""


def stop(run: RunArg, json: JsonOpt = False) -> None:
    """Stop a run as Ctrl-C would; it can be resumed.

    The run's supervisor then ends all of its processes.
    """
    from astracli.launch import queued

    found = the_run(run)
    status, job = found.status(), queued.of(found)
    if job is not None and queued.state(job) is not None:
        _stop_job(found, job, json)
        return
    if status is None or not found.going():
        raise UserError(
            f"run `{found.path}` is not running (state: {found.shown_state()})",
            "`astra runs list` shows which ones are",
        )
    import socket

    import psutil

    if status.host != socket.gethostname():
        raise UserError(f"run `{found.path}` runs on {status.host}, this is {socket.gethostname()}", "stop it there")
    os.kill(status.pid, signal.SIGTERM)
    try:
        psutil.Process(status.pid).wait(timeout=STOP_WAIT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise RunFailed(
            f"run `{found.path}` still stops after {STOP_WAIT_S:.0f} s (supervisor {status.pid})",
            f"follow it with `astra runs logs {found.path} -f`",
        ) from None
    if json:
        out(json).document({"run": str(found.path), "pid": status.pid, "state": found.shown_state()})
        return
    out().note(f"stopped `{found.path}` (supervisor {status.pid})")
    out().hint(f"continue it with `astra train --resume {found.path}`")


def _stop_job(run: RunDir, job: Job, json: bool) -> None:
    """The run of a job of a queue, wherever it runs."""
    import time

    from astracli.launch import queued

    began = run.going()
    queued.stop(job)
    deadline = time.monotonic() + JOB_STOP_WAIT_S
    while time.monotonic() < deadline and (run.going() or queued.state(job) is not None):
        time.sleep(0.5)
    if run.going():
        raise RunFailed(f"run `{run.path}` still stops after {JOB_STOP_WAIT_S:.0f} s ({queued.words(job)})")
    if json:
        out(json).document({"run": str(run.path), "job": job.ident, "state": run.shown_state()})
        return
    out().note(f"stopped `{run.path}` ({job.cluster} job {job.ident})" if began else f"took job {job.ident} back")
    out().hint(f"{'continue' if began else 'start'} it with `astra train --resume {run.path}`")


def export(
    run: OptionalRunArg = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default RUN/export-latest, -STEP or -best.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="STEP", help="A checkpoint's step; default the newest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint with the best score, which checkpoint.best keeps.")
    ] = False,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="The text model alone, under text names, whatever it was loaded from.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA run: the adapter alone, as peft stores it; default merged.")
    ] = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face directory."""
    from astracli.config import recipe_io
    from astracli.data import fetch

    found = the_run(run)
    recipe = recipe_io.load(found.recipe_json)
    if best and step is not None:
        raise UserError(f"both --best and --step {step} given", "leave one out")
    if adapter and text_only:
        raise UserError("both --adapter and --text-only given", "an adapter holds no other weights: leave one out")
    chosen = None
    if best:
        from astracli.training import best as best_checkpoint

        chosen = best_checkpoint.required(found, recipe)
        step = chosen.score.step
    model_dir = fetch.local_path(recipe.model.path) or fetch.fetch_model(recipe.model.path, recipe.model.revision)
    from astracli.training.export_run import export_checkpoint

    which = "best" if best else "latest" if step is None else str(step)
    place = to or found.path / (f"export-{which}" + ("-text" if text_only else "-adapter" if adapter else ""))
    done = export_checkpoint(
        found.checkpoints, recipe, model_dir, place, step=step, text_only=text_only, adapter_only=adapter
    )
    out().text(str(place))
    reason = f", the best of {chosen.among} evaluated: {chosen.score.words}" if chosen else ""
    out().note(f"step {done} of `{found.path}`{reason}")


def clean(
    run: CleanedRunArg = None,
    root: RootOpt = Path("runs"),
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than", metavar="DAYS", min=0, help="Without RUN: only runs that ended before so many days."
        ),
    ] = 1.0,
    resumable: Annotated[
        bool,
        typer.Option("--resumable", help="Without RUN: also runs that failed or were stopped; a resume still works."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
    json: JsonOpt = False,
) -> None:
    """Free disk space of runs that have ended.

    Deletes published weights, configurations and staged payloads. Keeps results, checkpoints and the export. If the
    supervisor of a run was killed, the processes that it left behind are ended first. Without RUN, it cleans all runs
    under --root that are done.
    """
    from astracli.runs import clean as cleaning

    if run is None:
        runs = cleaning.cleanable(root, older_than_s=older_than * 86400, resumable=resumable)
    else:
        one = the_run(run)
        if one.in_use() or one.going():
            raise UserError(f"run `{one.path}` is running", f"stop it first: `astra runs stop {one.path}`")
        runs = [one]
    for r in runs if not dry_run else []:
        for pid in cleaning.end_leftovers(r):
            out().note(f"ended process {pid} that `{r.path}` left behind")
    freed = [cleaning.clean(r, dry_run=dry_run) for r in runs]
    rows = [(str(r.path), count) for r, count in zip(runs, freed, strict=True) if count]
    total = sum(freed)
    if json:
        named = [{"run": path, "bytes": count} for path, count in rows]
        out(json).document({"runs": named, "bytes": total, "removed": not dry_run})
        return
    from astracli.report.words import size

    for path, count in rows:
        out().text(f"{path}  {size(count)}")
    verb = "would free" if dry_run else "freed"
    out().text(f"{verb} {size(total)} in {len(rows)} {'run' if len(rows) == 1 else 'runs'}")
    if run is None and not rows:
        days = f"{older_than:g} day{'' if older_than == 1 else 's'}"
        out().hint(f"runs that ended less than {days} ago stay (--older-than), and failed ones (--resumable)")
