"""`astra train`: rollout, training and evaluation together."""

from __future__ import annotations

import typer

from astracli.cli import options
from astracli.cli.output import out
from astracli.cli.plan_view import print_plan, refuse_facts
from astracli.errors import UserError


def train(
    recipe_name: options.RecipeArg = None,
    recipe: options.RecipeOpt = None,
    set_: options.SetOpt = None,
    dry_run: options.DryRunOpt = False,
    facts: options.FactsOpt = None,
    run_dir: options.RunDirOpt = None,
    resume: options.ResumeOpt = None,
    json: options.JsonOpt = False,
) -> None:
    """Train: rollout, trainer and evaluation together.

    Starts engines and workers as supervised processes; Ctrl-C ends them all and --resume goes on from there. With
    --resume the recipe is the run's own; --set then changes how long, where and how it runs, not what it learns from.
    --json goes with --dry-run, and so does --facts: it plans for a machine that is not this one.
    """
    refuse_facts(facts, dry_run, "train")
    if json and not dry_run:
        raise UserError(
            "--json prints a plan: it goes with --dry-run", "a run's figures: `astra runs status RUN --json`"
        )
    if resume is None:
        loaded = options.load_recipe(recipe_name, recipe, set_, "train")
    else:
        from astracli.config import recipe_io
        from astracli.runs.find import named

        if name := options.one_name(recipe_name, recipe):
            raise UserError(
                f"both a recipe (`{name}`) and --resume {resume} given",
                "--resume takes the run's own recipe; leave the other out",
            )
        if run_dir is not None:
            raise UserError(
                f"both --run-dir {run_dir} and --resume {resume} given", "a resumed run stays in its directory"
            )
        run = named(str(resume))
        resume, loaded = run.path, recipe_io.load(run.recipe_json, set_ or ())

    if dry_run:
        print_plan(loaded, "train", out(json), facts)
        return
    from astracli.launch import run as launch

    raise typer.Exit(launch.train(loaded, run_dir=run_dir, resume=resume, dry_run=False))
