"""`astra rollout`: engines and generation only; graded samples without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from astracli.cli.options import DryRunOpt, JsonOpt, RecipeArg, RecipeOpt, RunDirOpt, SetOpt, load_recipe
from astracli.cli.output import out
from astracli.cli.plan_view import print_plan
from astracli.errors import UserError


def rollout(
    recipe_name: RecipeArg = None,
    recipe: RecipeOpt = None,
    set_: SetOpt = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="DIR", help="Checkpoint directory or Hub id; default the recipe's model."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Prompts to answer, each with the recipe's group_size samples.")
    ] = 32,
    out_: Annotated[
        Path, typer.Option("--out", metavar="F.jsonl", help="Where the samples go, one JSON line each.")
    ] = Path("rollout.jsonl"),
    run_dir: RunDirOpt = None,
    dry_run: DryRunOpt = False,
    json: JsonOpt = False,
) -> None:
    """Generate and grade samples, without training."""
    if json and not dry_run:
        raise UserError("--json prints a plan: it goes with --dry-run", "samples are JSON lines already: see --out")
    loaded = load_recipe(recipe_name, recipe, set_, "rollout")
    if dry_run:
        print_plan(loaded, "rollout", out(json))
        return
    from astracli.launch import run as launch

    if out_.is_dir():
        raise UserError(f"--out `{out_}` is a directory", "name a file")
    if not out_.resolve().parent.is_dir():
        raise UserError(
            f"--out `{out_}`: there is no directory `{out_.parent}`", f"make it with `mkdir -p {out_.parent}`"
        )
    raise typer.Exit(launch.rollout(loaded, weights=weights, n=n, out=out_, run_dir=run_dir))
