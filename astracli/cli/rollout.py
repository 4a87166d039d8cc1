"""`astra rollout`: engines and generation only; graded samples without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from astracli.cli import options
from astracli.cli.output import out
from astracli.cli.plan_view import print_plan, refuse_facts
from astracli.errors import UserError


def rollout(
    recipe_name: options.RecipeArg = None,
    recipe: options.RecipeOpt = None,
    set_: options.SetOpt = None,
    weights: options.WeightsOpt = None,
    n: Annotated[
        int,
        typer.Option("--n", metavar="N", min=1, help="Prompts to answer, each with the recipe's group_size samples."),
    ] = 32,
    out_: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the samples go, one JSON line each.")
    ] = Path("rollout.jsonl"),
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="all|right", help="Write all samples, or only those whose verdict is right."),
    ] = "all",
    run_dir: options.RunDirOpt = None,
    dry_run: options.DryRunOpt = False,
    facts: options.FactsOpt = None,
    json: options.JsonOpt = False,
) -> None:
    """Generate and grade samples, without training."""
    refuse_facts(facts, dry_run, "rollout")
    if json and not dry_run:
        raise UserError("--json prints a plan: it goes with --dry-run", "samples are JSON lines already: see --out")
    if keep not in ("all", "right"):
        raise UserError(f"--keep `{keep}` is not known", "it takes `all` or `right`")
    loaded = options.load_recipe(recipe_name, recipe, set_, "rollout")
    if dry_run:
        print_plan(loaded, "rollout", out(json), facts)
        return
    from astracli.launch import run as launch

    _check_writable(out_)
    kept: Literal["all", "right"] = "right" if keep == "right" else "all"
    raise typer.Exit(launch.rollout(loaded, weights=weights, n=n, out=out_, run_dir=run_dir, keep=kept))


def _check_writable(path: Path) -> None:
    """Samples of an earlier command are never overwritten. Raises UserError."""
    if path.is_dir():
        raise UserError(f"--out `{path}` is a directory", "name a file")
    if not path.resolve().parent.is_dir():
        raise UserError(
            f"--out `{path}`: there is no directory `{path.parent}`", f"make it with `mkdir -p {path.parent}`"
        )
    try:
        path.open("x").close()
        path.unlink()
    except FileExistsError:
        raise UserError(
            f"--out `{path}` is there already", "name another file with --out, or remove it first"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--out `{path}` cannot be written: {reason}", "name another file") from None
