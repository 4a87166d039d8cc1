"""`astra runs compare` and `astra eval --compare`: several runs beside each other, and is one better than the first?"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astracli.cli.options import JsonOpt, complete_run
from astracli.cli.output import out, room
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.evaluation.compare import Against
    from astracli.runs.run_dir import RunDir
    from astracli.training.best import Score

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

    splits = [_split(text) for text in several(runs)]
    found, steps = [run for run, _ in splits], [_step(*split) for split in splits]
    marks = many_runs.MARKS[: len(found)]
    differ = many_runs.settings(found)
    common = many_runs.common_benchmarks(found)
    title, curves = _curves(found, metric, common)
    named = dict(zip(marks, curves, strict=True))
    tests, left_out = _tests(runs)
    notes = [*_caveats(marks, found, common), *left_out]
    if json:
        rows = [
            {"mark": mark, **many_runs.row(run), "score": _at(many_runs.scores(run, common), step)}
            for mark, run, step in zip(marks, found, steps, strict=True)
        ]
        tested = [test_document(test) for test in tests]
        out(json).document(
            {"runs": rows, "settings": differ, "plot": {"of": title, "lines": named}, "tests": tested, "notes": notes}
        )
        return
    headers = ["", "run", "state", "step", "first score", "score", "of step", "reward", "wall s"]
    out().table(headers, _rows(marks, runs, found, steps, common))
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


def _caveats(marks: str, runs: Sequence[RunDir], common: Sequence[str]) -> Iterator[str]:
    """Why scores of these runs may not mean the same. `common`: the benchmarks that all of them have."""
    from astracli.report import many_runs, run_files
    from astracli.runs import metrics

    every = {name for run in runs for name in run_files.eval_rows(run)} - {metrics.OVERALL}
    if common and every != set(common):
        yield f"scores are those on {', '.join(common)}, which all of these runs were evaluated on"
    elif every and not common:
        yield "these runs were evaluated on different benchmarks: their scores do not compare"
    for name, of in many_runs.graders(runs, common).items():
        each = ", ".join(f"{mark} by {grader}" for mark, grader in zip(marks, of, strict=True) if grader)
        yield f"warning: `{name}` was not graded alike ({each}): its scores do not mean the same"


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


def _step(run: RunDir, step: str) -> int | None:
    """The step that RUN@STEP or RUN@best names; None without one. Raises UserError."""
    if step == "best":
        from astracli.config import recipe_io
        from astracli.training import best

        return best.required(run, recipe_io.load(run.recipe_json)).score.step
    return int(step) if step else None


def shares_of(text: str) -> str:
    """What `evaluation.compare.read_shares` takes: a run's directory, with a step where one is meant. Raises
    UserError."""
    run, step = _split(text)
    found = _step(run, step)
    return str(run.path) if found is None else f"{run.path}@{found}"


def _rows(
    marks: str, texts: Sequence[str], runs: Sequence[RunDir], steps: Sequence[int | None], common: Sequence[str]
) -> list[list[Any]]:
    from astracli.report import many_runs

    rows = []
    for mark, text, run, step in zip(marks, texts, runs, steps, strict=True):
        row, scores = many_runs.row(run), many_runs.scores(run, common)
        name = row["run"] if step is None else f"{row['run']}@{text.rpartition('@')[2]}"
        first = _score(vars(scores[0])) if len(scores) > 1 else None
        score = _at(scores, step)
        of = score["step"] if score else None
        rows.append([mark, name, row["state"], row["step"], first, _score(score), of, row["reward"], row["wall_s"]])
    return rows


def _at(scores: Sequence[Score], step: int | None) -> dict[str, Any] | None:
    """The score of a step, the newest without one."""
    found = [score for score in scores if step is None or score.step == step]
    return vars(found[-1]) if found else None


def _score(score: Mapping[str, Any] | None) -> str | None:
    return f"{score['avg_at_n']:.3f} ± {score['stderr']:.3f}" if score else None


def _curves(
    runs: Sequence[RunDir], metric: str | None, common: Sequence[str]
) -> tuple[str, list[list[tuple[int, float]]]]:
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
    scored = [[(score.step, score.avg_at_n) for score in many_runs.scores(run, common)] for run in runs]
    if any(len(line) > 1 for line in scored):
        return "score (avg@n)", scored
    return "reward", [many_runs.rewards(metrics.read(run.metrics_jsonl)) for run in runs]


def _tests(runs: Sequence[str]) -> tuple[list[Against], list[str]]:
    """(each run against the first, why one is left out)"""
    from astracli.evaluation import compare as comparison

    shares: dict[str, comparison.Shares] = {}
    notes: list[str] = []
    for text in runs:
        try:
            read = comparison.read_shares(shares_of(text))
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
    count = len({test.run for test in tests})
    rows = []
    for test in tests:
        d = test.difference
        shares, interval = (f"{d.a:.3f}", f"{d.b:.3f}", f"{d.difference:+.3f}"), f"{d.low:+.3f} to {d.high:+.3f}"
        rows.append([test.run, d.benchmark, d.items, *shares, interval, test.p_holm, test.verdict])
    out().text("")
    p = "p (Holm)" if count > 1 else "p"
    out().table(
        ["run", "benchmark", "items", "first", "this", "change", "95 %", p, "difference"],
        rows,
        "paired test of each run against the first, over items",
    )
    if count > 1:
        words = f"p (Holm) is corrected for {count} comparisons: a difference is real where it is at most 0.05"
        out().text(textwrap.fill(words, room()))


def test_document(test: Against) -> dict[str, Any]:
    import math

    row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in vars(test.difference).items()}
    return {"run": test.run, **row, "p_holm": test.p_holm, "verdict": test.verdict}
