"""`astra eval`: avg@n and pass@k of weights on a recipe's benchmarks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from astracli.cli import options
from astracli.cli.output import out, room
from astracli.cli.plan_view import print_plan, refuse_facts
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.runs.run_dir import RunDir


RunDirOpt = Annotated[
    Path | None, typer.Option("--run-dir", metavar="RUN", help="Evaluate this run's export, with the run's own recipe.")
]
BenchmarkOpt = Annotated[
    list[str] | None, typer.Option("--benchmark", metavar="NAME", help="Only this benchmark; may be repeated.")
]
SamplesOpt = Annotated[int | None, typer.Option("--samples", metavar="N", min=1, help="Samples per item.")]
EngineOpt = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME", help="The engine, as rollout.engine: auto, or an installed one."),
]
ToOpt = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Directory for the results; default: a new one under runs/, or under the run's eval/.",
    ),
]
ResumeOpt = Annotated[
    Path | None, typer.Option("--resume", metavar="DIR", help="Continue an evaluation that was stopped.")
]
CompareOpt = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--compare",
        metavar="RUN RUN...",
        help="Compare evaluations with the first one. Each is a RUN or RUN@STEP.",
    ),
]


def evaluate(
    context: typer.Context,
    recipe_name: options.RecipeArg = None,
    recipe: options.RecipeOpt = None,
    set_: options.SetOpt = None,
    weights: options.WeightsOpt = None,
    run_dir: RunDirOpt = None,
    benchmark: BenchmarkOpt = None,
    samples: SamplesOpt = None,
    engine: EngineOpt = None,
    to: ToOpt = None,
    resume: ResumeOpt = None,
    compare: CompareOpt = None,
    dry_run: options.DryRunOpt = False,
    facts: options.FactsOpt = None,
    json: options.JsonOpt = False,
) -> None:
    """Evaluate a model, or the newest run.

    Without a recipe, it evaluates the newest run under runs/ that has an export, with the run's own recipe.
    With a recipe, it evaluates the recipe's model, or --weights.
    With --compare, it generates nothing: it tests, item by item, whether B is better than A. `astra runs compare` shows
    more about the runs.
    """
    given = {
        "--recipe": recipe, "--set": set_, "--weights": weights, "--run-dir": run_dir, "--out": to,
        "--benchmark": benchmark, "--samples": samples, "--engine": engine, "--resume": resume,
        "--facts": facts, "--dry-run": dry_run or None,
    }  # fmt: skip
    used = [name for name, value in given.items() if value is not None]
    if compare is not None:
        if used:
            raise UserError(f"--compare generates nothing: {used[0]} means nothing with it", f"leave {used[0]} out")
        _compare([*compare, *([recipe_name] if recipe_name else []), *context.args], json)
        return
    _refuse_words(context.args)
    refuse_facts(facts, dry_run, "eval")
    from astracli.config import recipe_io
    from astracli.runs.find import named

    run: RunDir | None = None
    changes = [*(set_ or ()), *([f"rollout.engine={engine}"] if engine else ())]
    if resume is not None:
        if recipe_name or set(used) - {"--resume", "--facts", "--dry-run"}:
            raise UserError("--resume goes on with an evaluation as it began", "leave the other options out")
        stopped = named(str(resume))
        resume, loaded = stopped.path, recipe_io.load(stopped.recipe_json)
    elif options.one_name(recipe_name, recipe) is not None:
        if run_dir is not None:
            raise UserError(
                "both a recipe and --run-dir given", "--run-dir takes the run's own recipe; leave the other out"
            )
        loaded = options.load_recipe(recipe_name, recipe, changes, "eval")
    else:
        run = _exported(named(str(run_dir))) if run_dir is not None else newest_exported()
        loaded = recipe_io.load(run.recipe_json, changes)
        weights = weights or str(run.export)
        out().note(f"evaluating {weights} by the recipe of {run.path}")

    if dry_run:
        print_plan(loaded, "eval", out(json), facts)
        return
    from astracli.launch import run as launch

    raise typer.Exit(
        launch.evaluate(
            loaded,
            weights=weights,
            run_dir=run.path if run else None,
            benchmarks=benchmark,
            samples=samples,
            out=to,
            resume=resume,
            as_json=json,
        )
    )


def _refuse_words(words: Sequence[str]) -> None:
    """More words than a recipe are for --compare alone."""
    if words:
        from astracli.config.recipe_io import SET_HINT

        hint = SET_HINT if "=" in words[0] else "`astra eval --help` shows what it takes"
        raise UserError(f"got unexpected extra argument ({words[0]})", hint)


def _compare(runs: Sequence[str], as_json: bool) -> None:
    from astracli.cli.runs_compare import print_tests, several, shares_of, test_document
    from astracli.evaluation import compare

    def shares(text: str) -> compare.Shares:
        return compare.read_shares(shares_of(text) if text.endswith("@best") else text)

    if len(runs) > 2:
        tests = compare.several({text: shares(text) for text in several(runs)})
        if as_json:
            out(True).document({"first": runs[0], "comparisons": [test_document(test) for test in tests]})
        else:
            print_tests(tests)
        return
    a, b = runs
    rows = compare.compare(shares(a), shares(b))
    out(as_json).table(
        ["benchmark", "items", "A", "B", "B - A", "95 % from", "to", "p", "difference"],
        [[r.benchmark, r.items, r.a, r.b, r.difference, r.low, r.high, r.p, r.verdict] for r in rows],
        document=compare.document(a, b, rows),
    )
    if not as_json:
        for row in rows:
            out().text(textwrap.fill(f"{row.benchmark}: {compare.words(row)}", room(), break_on_hyphens=False))


def newest_exported(root: Path = Path("runs")) -> RunDir:
    """The newest run under `root` that has an export. Raises UserError when there is none."""
    from astracli.runs.find import list_runs

    runs = list_runs(root)
    for run in runs:
        if (run.export / "config.json").is_file():
            return run
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    have = f"{count} under `{root}`, none with an export" if runs else f"no runs under `{root}`"
    raise UserError(
        f"nothing to evaluate: {have}", "train one with `astra train RECIPE`, or name a recipe: `astra eval RECIPE`"
    )


def _exported(run: RunDir) -> RunDir:
    if not (run.export / "config.json").is_file():
        checkpoint = f"`astra runs export {run.path} --out DIR`, then `astra eval RECIPE --weights DIR`"
        raise UserError(
            f"run `{run.path}` has no export (state: {run.shown_state()})",
            f"it is made at the end; its newest checkpoint meanwhile: {checkpoint}"
            if run.going()
            else f"finish it with `astra train --resume {run.path}`",
        )
    return run
