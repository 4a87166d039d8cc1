"""`astra runs`: look at runs, follow their logs and samples, stop them, free their disk."""

from __future__ import annotations

import os
import signal
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astracli.cli.options import JsonOpt, OptionalRunArg, RunArg, complete_run
from astracli.cli.output import out
from astracli.errors import RunFailed, UserError

if TYPE_CHECKING:
    from astracli.run_dir import RunDir
    from astracli.run_view import Outcome

app = typer.Typer(help="Look at runs, stop them, free their disk.", rich_markup_mode=None, no_args_is_help=True)
RootOpt = Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder that holds the runs.")]
CleanedRunArg = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="Run name or directory; default all that are done.", autocompletion=complete_run
    ),
]
STOP_WAIT_S = 10.0


@app.command("list")
def list_(root: RootOpt = Path("runs"), json: JsonOpt = False) -> None:
    """List the runs, newest first."""
    from astracli import run_dir, run_view

    rows = [run_view.row(run) for run in run_dir.list_runs(root)]
    if json:
        out(json).document(rows)
    elif not rows:
        out().note(f"no runs under `{root}`")
    else:
        out().table(
            ["run", "state", "step", "started", "wall s"],
            [[r["run"], r["state"], _of(r["step"], r["steps"]), r["started"], r["wall_s"]] for r in rows],
        )


@app.command()
def status(run: OptionalRunArg = None, json: JsonOpt = False) -> None:
    """Show a run's state and newest figures, process by process."""
    from dataclasses import asdict

    from astracli import run_view

    found = _run(run)
    recorded = found.status()
    document = {
        "run": run_view.row(found),
        "status": asdict(recorded) if recorded else None,
        "figures": run_view.newest_figures(found),
    }
    if json:
        out(json).document(document)
        return
    shown = dict(document["run"] or {})
    if recorded and recorded.cause:
        shown["cause"] = recorded.cause
    out().facts(shown)
    for process, figures in run_view.newest_figures(found).items():
        out().facts(figures, process)


@app.command()
def logs(
    run: RunArg,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Process, for example trainer; default all.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing while the run lives.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=0, help="Last lines of each log.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print each line as a JSON object: process, line.")] = False,
) -> None:
    """Print the logs of a run's newest attempt.

    A process writes here what it has to complain about: the log of one that is well may be empty.
    """
    from astracli import run_view

    found = _run(run)
    files = run_view.log_files(found, name)
    if empty := [file.stem for file in files if not file.stat().st_size]:
        out().note(f"nothing in the log{'s' if len(empty) > 1 else ''} of {', '.join(empty)}")
    files = [file for file in files if follow or file.stem not in empty]
    for file in files:
        if len(files) > 1 and not json:
            out().text(f"==> {file.stem} <==")
        for line in run_view.last_lines(file, lines):
            out().text(_log_line(file.stem, line) if json else line)
    if follow:
        for file, line in run_view.follow(files, lambda: _alive(found)):
            plain = f"{file.stem}: {line}" if len(files) > 1 else line
            out().text(_log_line(file.stem, line) if json else plain)


def _log_line(process: str, line: str) -> str:
    return dumps({"process": process, "line": line}, ensure_ascii=False)


@app.command()
def stop(run: RunArg, json: JsonOpt = False) -> None:
    """Stop a run as Ctrl-C would; it can be resumed.

    Its supervisor ends every process of it.
    """
    found = _run(run)
    status = found.status()
    if status is None or not _alive(found):
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


@app.command()
def report(run: OptionalRunArg = None, json: JsonOpt = False) -> None:
    """Write report.html and print a run's figures.

    Of a run that has ended, the closing table; of one that goes on, its figures so far.
    """
    from astracli import report_html, run_view

    found = _run(run)
    out().note(f"wrote {report_html.write(found)}")
    summary, results = run_view.summary(found), run_view.results(found)
    if results is not None and not json:
        from astracli.closing import result_lines

        out().text("\n".join(result_lines(results)))
        return
    if summary is not None and not json:
        from rich.console import Console

        from astracli.closing import print_closing

        print_closing(summary, Console(width=100))
        return
    document = run_view.report(found) | {"summary": summary, "results": results}
    if json:
        out(json).document(document)
        return
    out().facts(document["run"])
    if document["evaluation"]:
        out().table(
            ["benchmark", "n", "step", "avg@n", "step", "avg@n", "difference", "stderr", "k", "pass@k", "pass@k"],
            [
                [t["benchmark"], t["n"], t["first_step"], t["first"], t["last_step"], t["last"], t["difference"],
                 t["stderr"], t["k"], t["pass_first"], t["pass_last"]]
                for t in document["evaluation"]
            ],
            "evaluation, first and last",
        )  # fmt: skip
        out().text("")
    if document["figures"]:
        rows = [[f["figure"], f["first"], f["last_tenth"]] for f in document["figures"]]
        out().table(["figure", "first step", "mean of the last tenth"], rows)
    if document["expected"]:
        out().text("")
        out().facts({k: v for k, v in document["expected"].items() if v is not None}, "expected")


@app.command()
def export(
    run: OptionalRunArg = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default RUN/export-latest or RUN/export-STEP.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="STEP", help="A checkpoint's step; default the newest.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="The text model alone, under text names, whatever it was loaded from.")
    ] = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face directory."""
    from astracli import recipe_io
    from astracli.launch import fetch

    found = _run(run)
    recipe = recipe_io.from_json(found.recipe_json)
    model_dir = fetch.local_path(recipe.model.path) or fetch.fetch_model(recipe.model.path, recipe.model.revision)
    from astracli.training.export_run import export_checkpoint

    place = to or found.path / ("export-" + ("latest" if step is None else str(step)) + ("-text" if text_only else ""))
    done = export_checkpoint(found.checkpoints, recipe, model_dir, place, step=step, text_only=text_only)
    out().text(str(place))
    out().note(f"step {done} of `{found.path}`")


@app.command()
def samples(
    run: OptionalRunArg = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Wrong answers.")] = False,
    right: Annotated[bool, typer.Option("--right", help="Right answers.")] = False,
    truncated: Annotated[bool, typer.Option("--truncated", help="Answers cut off at the token limit.")] = False,
    step: Annotated[int | None, typer.Option("--step", metavar="STEP", help="Only this step's.")] = None,
    n: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="At most so many, the newest.")] = 10,
    json: JsonOpt = False,
) -> None:
    """Print samples of a run or an evaluation.

    Of a run some of each step's rollouts, of an `astra eval` all answers: problem, completion, verdict.
    """
    from collections import deque

    from astracli import run_view

    chosen = {"wrong": wrong, "right": right, "truncated": truncated}
    outcomes: set[Outcome] = {name for name, asked in chosen.items() if asked}  # type: ignore[misc]
    found = list(deque(run_view.samples(_run(run), outcomes=outcomes, step=step), maxlen=n))
    if json:
        out(json).document(found)
        return
    if not found:
        out().note("no such samples")
    for sample in found:
        out().text(_sample_text(sample))


@app.command()
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
    """Free the disk of ended runs.

    Published weights, configurations and staged payloads go; results, checkpoints and export stay. Processes that a
    run left behind when its supervisor was killed are ended first. Without RUN: all under --root that are done.
    """
    from astracli import run_view

    if run is None:
        runs = run_view.cleanable(root, older_than_s=older_than * 86400, resumable=resumable)
    else:
        one = _run(run)
        if one.in_use() or _alive(one):
            raise UserError(f"run `{one.path}` is running", f"stop it first: `astra runs stop {one.path}`")
        runs = [one]
    for r in runs if not dry_run else []:
        for pid in run_view.end_leftovers(r):
            out().note(f"ended process {pid} that `{r.path}` left behind")
    freed = [run_view.clean(r, dry_run=dry_run) for r in runs]
    rows = [(str(r.path), count) for r, count in zip(runs, freed, strict=True) if count]
    total = sum(freed)
    if json:
        named = [{"run": path, "bytes": count} for path, count in rows]
        out(json).document({"runs": named, "bytes": total, "removed": not dry_run})
        return
    from astracli.closing import size

    for path, count in rows:
        out().text(f"{path}  {size(count)}")
    verb = "would free" if dry_run else "freed"
    out().text(f"{verb} {size(total)} in {len(rows)} {'run' if len(rows) == 1 else 'runs'}")
    if run is None and not rows:
        out().hint(
            f"runs that ended less than {older_than:g} days ago stay (--older-than), and failed ones (--resumable)"
        )


def _run(text: str | None) -> RunDir:
    """A run by name or path; None is the newest. Raises UserError."""
    from astracli import run_dir

    if text is not None:
        return run_dir.named(text)
    found = run_dir.newest()
    if found is None:
        raise UserError("no runs under `runs`", "start one with `astra train RECIPE`, or name a run directory")
    return found


def _alive(run: RunDir) -> bool:
    status = run.status()
    return status is not None and status.state == "running" and status.alive()


def _of(step: int | None, steps: int | None) -> str:
    return "-" if step is None else f"{step}/{steps}" if steps else str(step)


def _sample_text(sample: dict[str, Any]) -> str:
    said = [f"{key} {sample.get(key)}" for key in ("step", "version", "reward")]
    said += [str(sample.get(key)) for key in ("problem_id", "verdict", "finish_reason")]
    said.append(f"{len(sample.get('tokens') or [])} tokens")
    body = "".join(f"  {key}: {sample.get(key)}\n" for key in ("problem", "answer", "completion"))
    return "  ".join(said) + "\n" + body
