"""`astra runs`: look at runs, their figures, logs and samples. What changes one is in `runs_change`."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astracli.cli import runs_change, runs_compare
from astracli.cli.options import JsonOpt, OptionalRunArg, RootOpt, complete_run, the_run
from astracli.cli.output import out

if TYPE_CHECKING:
    from astracli.report.run_files import Outcome

app = typer.Typer(help="Look at runs, stop them, free their disk.", rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def list_(root: RootOpt = Path("runs"), json: JsonOpt = False) -> None:
    """List the runs, newest first: state, steps, newest score and reward, and the settings in which they differ.

    The score is avg@n of the newest evaluation; with several benchmarks it is their mean, `overall`. The reward is the
    mean over the newest ten steps. `astra runs compare` shows more about a few runs.
    """
    from astracli.report import many_runs
    from astracli.runs import find as runs

    found = runs.list_runs(root)
    if not found and not json:
        out().note(f"no runs under `{root}`")
        return
    differ = many_runs.settings(found, skip_damaged=True)
    rows, shown = [], []
    for place, run in enumerate(found):
        row = many_runs.row(run) | {"settings": {key: values[place] for key, values in differ.items()}}
        score = f"{row['score']['avg_at_n']:.3f}" if row["score"] else None
        reward = f"{row['reward']:.3f}" if row["reward"] is not None else None
        differs = many_runs.differing_words(differ, place)
        rows.append(row)
        shown.append([row["run"], row["state"], _of(row["step"], row["steps"]), score, reward, row["wall_s"], differs])
    out(json).table(["run", "state", "step", "score", "reward", "wall s", "differs in"], shown, document=rows)


@app.command()
def status(run: OptionalRunArg = None, json: JsonOpt = False) -> None:
    """Show the state of a run: its processes, step, reward, last evaluation, and what it waits for.

    Without a name, of the newest training run.

    For a run that failed, it shows the cause and the last lines. --json has every figure of every process.
    """
    from dataclasses import asdict

    from astracli.launch import queued
    from astracli.report import run_files, status_page

    found = the_run(run, training=True)
    job = queued.of(found)
    if json:
        recorded = found.status()
        out(json).document(
            {
                "run": run_files.row(found),
                "status": asdict(recorded) if recorded else None,
                "job": asdict(job) | {"state": queued.words(job)} if job is not None else None,
                "newest": status_page.figures(found),
                "evaluation": [vars(trend) | {"difference": trend.difference} for trend in run_files.trends(found)],
                "figures": run_files.newest_figures(found),
            }
        )
        return
    page = status_page.page(found)
    out().table([], [*page.rows, *([("job", queued.words(job))] if job is not None else [])])
    if page.last_lines:
        out().text("")
        out().text("\n".join(page.last_lines))
    if page.hint and not (job is not None and queued.goes_on(job)):  # its job goes on with it
        out().hint(page.hint)


@app.command()
def logs(
    run: OptionalRunArg = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Process, for example trainer; default all.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing while the run lives.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", metavar="N", min=0, help="Last lines of each log.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print each line as a JSON object: process, line.")] = False,
) -> None:
    """Print the logs of a run's newest attempt.

    Logs hold warnings and errors. The log of a healthy process may be empty.
    """
    from astracli.report import run_files

    found = the_run(run)
    files = run_files.log_files(found, name)
    if empty := [file.stem for file in files if not file.stat().st_size]:
        out().note(f"nothing in the log{'s' if len(empty) > 1 else ''} of {', '.join(empty)}")
    files = [file for file in files if follow or file.stem not in empty]
    for file in files:
        if len(files) > 1 and not json:
            out().text(f"==> {file.stem} <==")
        for line in run_files.last_lines(file, lines):
            out().text(_log_line(file.stem, line) if json else line)
    if follow:
        for file, line in run_files.follow(files, lambda: found.going()):
            plain = f"{file.stem}: {line}" if len(files) > 1 else line
            out().text(_log_line(file.stem, line) if json else plain)


def _log_line(process: str, line: str) -> str:
    return dumps({"process": process, "line": line}, ensure_ascii=False)


@app.command()
def report(run: OptionalRunArg = None, json: JsonOpt = False) -> None:
    """Write report.html and print a run's figures.

    For a run that has ended, it prints the summary table; for a run that is still going, its figures so far.
    """
    from astracli.report import run_files
    from astracli.report.page import html as report_html

    found = the_run(run)
    out().note(f"wrote {report_html.write(found)}")
    summary, results = run_files.summary(found), run_files.results(found)
    if results is not None and not json:
        from astracli.cli.output import room
        from astracli.report.results import result_lines

        out().text("\n".join(result_lines(results, room() if sys.stdout.isatty() else None)))
        return
    if summary is not None and not json:
        from rich.console import Console

        from astracli.cli.output import room
        from astracli.report.summary_table import print_summary

        print_summary(summary, Console(width=room()), wrap=True)
        if summary.get("cause") and summary["state"] == "failed":
            out().text("\n".join(["", summary["cause"], *summary.get("last_lines", [])]))
        return
    document = run_files.report(found) | {"summary": summary, "results": results}
    if json:
        out(json).document(document)
        return
    out().facts(document["run"])
    if document["evaluation"]:
        out().table(
            ["benchmark", "grader", "figure", "first step", "first", "last step", "last", "difference"],
            [
                row
                for t in document["evaluation"]
                for row in (
                    [t["benchmark"], t["grader"], f"avg@{t['n']}", t["first_step"], t["first"], t["last_step"],
                     t["last"], t["difference"]],
                    ["", "", f"pass@{t['k']}", None, t["pass_first"], None, t["pass_last"],
                     t["pass_last"] - t["pass_first"]],
                )
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
def samples(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run name or directory, or the file of `astra rollout --out`; default the newest run.",
            autocompletion=complete_run,
        ),
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Wrong answers.")] = False,
    right: Annotated[bool, typer.Option("--right", help="Right answers.")] = False,
    truncated: Annotated[bool, typer.Option("--truncated", help="Answers cut off at the token limit.")] = False,
    step: Annotated[int | None, typer.Option("--step", metavar="STEP", help="Only this step's.")] = None,
    n: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, help="At most so many, the newest.")] = 10,
    json: JsonOpt = False,
) -> None:
    """Print samples of a run, an evaluation or a file of `astra rollout`.

    Shows problem, completion, verdict, and what the reward logged. A run keeps some rollouts of each step; an
    evaluation keeps all answers.
    """
    from collections import deque

    from astracli.report import run_files

    chosen = {"wrong": wrong, "right": right, "truncated": truncated}
    outcomes: set[Outcome] = {name for name, asked in chosen.items() if asked}  # type: ignore[misc]
    source = Path(run) if run is not None and Path(run).is_file() else the_run(run)
    found = list(deque(run_files.samples(source, outcomes=outcomes, step=step), maxlen=n))
    if json:
        out(json).document(found)
        return
    if not found:
        out().note("no such samples; those of `astra rollout` are in the file that its --out named")
    for sample in found:
        out().text(_sample_text(sample))


app.command("compare")(runs_compare.compare)
app.command("export")(runs_change.export)
app.command("stop")(runs_change.stop)
app.command("clean")(runs_change.clean)


def _of(step: int | None, steps: int | None) -> str:
    return "-" if step is None else f"{step}/{steps}" if steps else str(step)


def _sample_text(sample: dict[str, Any]) -> str:
    named = {"step": "step", "version": "version", "problem_id": "id", "reward": "reward"}
    said = [f"{word} {sample[key]}" for key, word in named.items() if sample.get(key) is not None]
    said += [str(sample.get(key)) for key in ("verdict", "finish_reason")]
    said.append(f"{len(sample.get('tokens') or [])} tokens")
    shown = [(key, sample.get(key)) for key in ("problem", "answer", "completion")]
    if parts := sample.get("parts"):
        shown.append(("parts", ", ".join(f"{name} {value:.4g}" for name, value in parts.items())))
    shown += [(name, text) for name, text in (sample.get("notes") or {}).items()]
    body = "".join(f"  {name}: {value}\n" for name, value in shown)
    return "  ".join(said) + "\n" + body
