"""`astra recipes`: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from astracli.cli.options import JsonOpt, RecipeArg, RecipeOpt, SetOpt, complete_recipe, load_recipe
from astracli.cli.output import out
from astracli.errors import UserError

app = typer.Typer(help="List, show, copy and check recipes.", rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def list_(json: JsonOpt = False) -> None:
    """List the recipes that come with the package."""
    from dataclasses import asdict

    from astracli.config import recipe_io

    found = recipe_io.shipped()
    rows = [[info.name, info.description] for info in found]
    out(json).table(["recipe", "what it does"], rows, document=[asdict(info) for info in found])


@app.command()
def show(recipe_name: RecipeArg = None, recipe: RecipeOpt = None, set_: SetOpt = None, json: JsonOpt = False) -> None:
    """Print a recipe as it will run, with every default filled in."""
    from astracli.config import recipe_io

    loaded = load_recipe(recipe_name, recipe, set_, "recipes show")
    if json:
        out(json).document(recipe_io.to_document(loaded))
    else:
        out().text(recipe_io.to_toml(loaded).rstrip())


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="Shipped recipe.", autocompletion=complete_recipe)],
    to: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to; default RECIPE.toml here.")] = None,
) -> None:
    """Copy a shipped recipe, comments and all, to change it."""
    from astracli.config import recipe_io

    text = recipe_io.source_text(name)
    target = to or Path(f"{name}.toml")
    if target.is_dir():
        target = target / f"{name}.toml"
    elif target.suffix != ".toml":
        raise UserError(f"`{target}` is no name for a recipe", f"name a directory that exists, or `{target}.toml`")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"`{target}` is there already", "name another file, or remove it first") from None
    except OSError as error:
        raise UserError(
            f"cannot write `{target}`: {(error.strerror or str(error)).lower()}",
            "name a file in a directory that exists",
        ) from None
    out().text(str(target))
    out().hint(f"change it, then `astra recipes check {target}` and `astra train {target}`")


@app.command()
def check(recipe_name: RecipeArg = None, recipe: RecipeOpt = None, set_: SetOpt = None, json: JsonOpt = False) -> None:
    """Check a recipe's keys and values. Exit 2 with the reason when something is wrong."""
    from astracli.data import fetch
    from astracli.models import registry

    loaded = load_recipe(recipe_name, recipe, set_, "recipes check")
    adapter = registry.resolve(loaded, fetch.local_path(loaded.model.path, made_by=loaded.model.made_by))
    facts = {
        "recipe": loaded.name,
        "model": loaded.model.path,
        "adapter": adapter.name,
        "steps": loaded.train.steps,
        "sequences_per_step": loaded.batch_sequences,
        "max_staleness": loaded.effective_staleness,
        "transfer": loaded.weights.transfer,
        "ok": True,
    }
    out(json).facts(facts)
