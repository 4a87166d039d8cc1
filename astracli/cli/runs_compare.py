"""`astra runs compare` and `astra eval --compare`: several runs beside each other, and is one better than the first?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astracli.cli.options import JsonOpt, complete_run
from astracli.cli.output import out, room
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.evaluation.compare import Against
    from astracli.runs.run_dir import RunDir

MOST = 26
"""Runs that are compared at once: each has a letter."""


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Names or directories; RUN@STEP tests the evaluation of a step, RUN@best that of the best checkpoint.",
            autocompletion=complete_run,
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="Plot this metric of metrics.jsonl; default score, else reward."),
    ] = None,
    json: JsonOpt = False,
) -> None:
    """Compare runs: scores, settings that differ, a plot, and a paired test of each against the first.

    The test is a sign-flip test over the items of their newest evaluations; its p is corrected for the number of runs.
    """
    from astracli.report import many_runs

    found = [_split(text)[0] for text in several(runs)]
    marks = many_runs.MARKS[: len(found)]
    differ = many_runs.settings(found)
    title, curves = _curves(found, metric)
    named = dict(zip(marks, curves, strict=True))
    tests, notes = _tests(runs)
    if json:
        rows = [{"mark": mark, **many_runs.row(run)} for mark, run in zip(marks, found, strict=True)]
        tested = [test_document(test) for test in tests]
        out(json).document(
            {"runs": rows, "settings": differ, "plot": {"of": title, "lines": named}, "tests": tested, "notes": notes}
        )
        return
    out().table(["", "run", "state", "step", "first score", "score", "reward", "wall s"], _rows(marks, found))
    if differ:
        from astracli.runs.changes import shown

        out().text("")
        out().table(
            ["setting", *marks], [[key, *map(shown, values)] for key, values in differ.items()], "settings that differ"
        )
    if drawn := many_runs.plot({mark: line for mark, line in named.items() if line}, width=room()):
        out().text("\n".join(["", f"{title}, over steps", *drawn]))
    print_tests(tests)
    for note in notes:
        out().note(note)


def several(runs: Sequence[str]) -> Sequence[str]:
    """The runs as given. Raises UserError when they are no comparison."""
    if twice := [text for text in dict.fromkeys(runs) if runs.count(text) > 1]:
        raise UserError(f"`{twice[0]}` is given twice", "a step of a run is RUN@STEP")
    if len(runs) < 2:
        raise UserError("a comparison takes two runs or more", "`astra runs list` shows them")
    if len(runs) > MOST:
        raise UserError(f"{len(runs)} runs given, {MOST} can be compared at once")
    return runs


def _split(text: str) -> tuple[RunDir, str]:
    """RUN, RUN@STEP or RUN@best -> the run, and the step in words ("" without one). Raises UserError."""
    from astracli.runs.find import named

    name, at, step = text.rpartition("@")
    return (named(name), step) if at and (step.isdigit() or step == "best") else (named(text), "")


def _shares_of(text: str) -> str:
    """What `evaluation.compare.read_shares` takes: the run's directory, with a step where one is meant."""
    run, step = _split(text)
    if step == "best":
        from astracli.config import recipe_io
        from astracli.training import best

        step = str(best.required(run, recipe_io.load(run.recipe_json)).score.step)
    return f"{run.path}@{step}" if step else str(run.path)


def _rows(marks: str, runs: Sequence[RunDir]) -> list[list[Any]]:
    from astracli.report import many_runs

    rows = []
    for mark, run in zip(marks, runs, strict=True):
        row, scores = many_runs.row(run), many_runs.scores(run)
        first = _score(vars(scores[0])) if len(scores) > 1 else None
        rows.append(
            [mark, row["run"], row["state"], row["step"], first, _score(row["score"]), row["reward"], row["wall_s"]]
        )
    return rows


def _score(score: Mapping[str, Any] | None) -> str | None:
    return f"{score['avg_at_n']:.3f} ± {score['stderr']:.3f}" if score else None


def _curves(runs: Sequence[RunDir], metric: str | None) -> tuple[str, list[list[tuple[int, float]]]]:
    """(what is plotted, its points by run): a metric; else scores where a run has two of them, else rewards."""
    from astracli.report import many_runs
    from astracli.runs import metrics

    if metric is not None:
        lines = [metrics.series(metrics.read(run.metrics_jsonl), metric) for run in runs]
        if not any(lines):
            names = {name for run in runs for record in metrics.read(run.metrics_jsonl) for name in record}
            import difflib

            near = difflib.get_close_matches(metric, names, n=3)
            raise UserError(
                f"no run has a metric `{metric}`",
                f"did you mean {' or '.join(near)}?" if near else "docs/run-directory.md lists them",
            )
        return metric, lines
    scored = [[(score.step, score.avg_at_n) for score in many_runs.scores(run)] for run in runs]
    if any(len(line) > 1 for line in scored):
        return "score (avg@n)", scored
    return "mean reward", [many_runs.rewards(metrics.read(run.metrics_jsonl)) for run in runs]


def _tests(runs: Sequence[str]) -> tuple[list[Against], list[str]]:
    """(each run against the first, why one is left out)"""
    from astracli.evaluation import compare as comparison

    shares: dict[str, comparison.Shares] = {}
    notes: list[str] = []
    for text in runs:
        try:
            read = comparison.read_shares(_shares_of(text))
            if shares:
                comparison.compare(next(iter(shares.values())), read, draws=1)
            shares[text] = read
        except UserError as error:
            notes.append(f"not in the paired test: `{text}`: {error.message}")
            if not shares:
                return [], notes
    return (comparison.several(shares) if len(shares) > 1 else []), notes


def print_tests(tests: Sequence[Against]) -> None:
    """The paired tests as a table."""
    if not tests:
        return
    rows = []
    for test in tests:
        d = test.difference
        interval = f"{d.low:+.3f} to {d.high:+.3f}"
        rows.append([test.run, d.benchmark, d.items, d.a, d.b, d.difference, interval, d.p, test.p_holm, test.verdict])
    out().text("")
    out().table(
        ["run", "benchmark", "items", "first", "this", "change", "95 %", "p", "p (Holm)", "difference"],
        rows,
        "paired test of each run against the first, over items",
    )
    if (count := len({test.run for test in tests})) > 1:
        out().text(f"p (Holm) is corrected for {count} comparisons: a difference is real where it is at most 0.05")


def test_document(test: Against) -> dict[str, Any]:
    import math

    row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(test.difference).items()}
    return {"run": test.run, **row, "p_holm": test.p_holm, "verdict": test.verdict}
