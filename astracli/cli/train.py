"""`astra train`: rollout, training and evaluation together. `astra sft` (`sft.py`) starts by the same function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from astracli.cli import options
from astracli.cli.output import out
from astracli.cli.plan_view import print_plan, refuse_facts
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.launch.from_run import Source
    from astracli.runs.run_dir import RunDir


FromOpt = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Start from the weights of another run: its newest, those of a step, or RUN@best.",
        autocompletion=options.complete_run,
    ),
]
KeepOptimizerOpt = Annotated[
    bool, typer.Option("--keep-optimizer", help="With --from: start with that checkpoint's optimizer state too.")
]


def train(
    recipe_name: options.RecipeArg = None,
    recipe: options.RecipeOpt = None,
    set_: options.SetOpt = None,
    dry_run: options.DryRunOpt = False,
    facts: options.FleetFactsOpt = None,
    run_dir: options.RunDirOpt = None,
    resume: options.ResumeOpt = None,
    from_: FromOpt = None,
    keep_optimizer: KeepOptimizerOpt = False,
    json: options.JsonOpt = False,
) -> None:
    """Train: rollout, trainer and evaluation together.

    Starts and supervises all processes of a run. Ctrl-C ends them; --resume continues the run later. A resumed run
    keeps its own recipe; --set can then change how long, how fast and where it runs, and the run records each change.
    --from starts a new run from the weights of another run, with the same recipe or another one. --json and --facts
    need --dry-run.
    """
    start("train", **locals())


def start(
    command: Literal["train", "sft"],
    *,
    recipe_name: str | None,
    recipe: str | None,
    set_: list[str] | None,
    dry_run: bool,
    facts: str | list[str] | None,
    run_dir: Path | None,
    resume: Path | None,
    from_: str | None,
    keep_optimizer: bool,
    json: bool,
) -> None:
    """What `astra train` and `astra sft` do: plan, or run."""
    documents: list[str | None] = [facts] if isinstance(facts, str) else [*facts] if facts else [None]
    first, *others = documents
    refuse_facts(first, dry_run, command)
    if json and not dry_run:
        raise UserError(
            "--json prints a plan: it goes with --dry-run", "a run's figures: `astra runs status RUN --json`"
        )
    name = options.one_name(recipe_name, recipe)
    _refuse_mixed(name, run_dir, resume, from_, keep_optimizer)
    run, source = None, None
    if resume is not None:
        from astracli.config import recipe_io
        from astracli.runs.find import named

        run = named(str(resume))
        loaded = recipe_io.load(run.recipe_json, set_ or ())
    elif from_ is not None:
        from astracli.config import recipe_io
        from astracli.launch import from_run

        source = from_run.find(from_, keep_optimizer=keep_optimizer)
        loaded = recipe_io.load(name or source.run.recipe_json, set_ or ())
    else:
        loaded = options.load_recipe(recipe_name, recipe, set_, command)

    if run is None:
        from astracli.launch import recipe_changes

        recipe_changes.require(loaded, command)
    if dry_run:
        print_plan(_as_started(loaded, run, source), loaded.command, out(json), first, resumed=run, others=others)
        return
    from astracli.launch import run as launch

    more = {"source": source, "keep_optimizer": keep_optimizer} if source is not None else {}
    raise typer.Exit(launch.train(loaded, command=command, run_dir=run_dir, resume=run.path if run else None, **more))


def _refuse_mixed(
    name: str | None, run_dir: Path | None, resume: Path | None, from_: str | None, keep_optimizer: bool
) -> None:
    """Raise UserError for options that contradict each other."""
    if resume is not None and name is not None:
        raise UserError(
            f"both a recipe (`{name}`) and --resume {resume} given",
            "--resume takes the run's own recipe; leave the other out",
        )
    if resume is not None and run_dir is not None:
        raise UserError(f"both --run-dir {run_dir} and --resume {resume} given", "a resumed run stays in its directory")
    if resume is not None and from_ is not None:
        raise UserError(
            f"both --from {from_} and --resume {resume} given",
            "--resume goes on with a run, --from starts a new one from its weights",
        )
    if keep_optimizer and from_ is None:
        raise UserError("--keep-optimizer without --from", "a resumed run keeps its optimizer state anyway")


def _as_started(recipe: Recipe, run: RunDir | None, source: Source | None) -> Recipe:
    """The recipe as the command would run it. Raises UserError for what it would refuse."""
    from astracli.launch import from_run, recipe_changes

    if run is not None:
        recipe, _ = recipe_changes.resumed_recipe(recipe, run)
        recipe_changes.resume_step(run, recipe)
    return from_run.checked(recipe, source) if source is not None else recipe
