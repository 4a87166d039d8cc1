"""Option types that the commands share, and how a recipe is named on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.runs.run_dir import RunDir


def complete_recipe(incomplete: str) -> Iterator[tuple[str, str]]:
    """Shipped recipe names for the shell, with their descriptions."""
    from astracli.config import recipe_io

    yield from ((info.name, info.description) for info in recipe_io.shipped() if info.name.startswith(incomplete))


def complete_run(incomplete: str) -> Iterator[str]:
    """Names of the runs under runs/ for the shell, newest first."""
    from astracli.runs import find as runs

    yield from (run.name for run in runs.list_runs() if run.name.startswith(incomplete))


def complete_facts(incomplete: str) -> Iterator[str]:
    """Names of the shipped machine documents for the shell."""
    from astracli.machine import documents

    yield from (name for name in documents.names() if name.startswith(incomplete))


RecipeArg = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE", help="Name of a shipped recipe, or path of a .toml file.", autocompletion=complete_recipe
    ),
]
RecipeOpt = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="The recipe, given as an option.", autocompletion=complete_recipe),
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value; may be repeated.")
]
WeightsOpt = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="DIR|HUB_ID", help="Checkpoint directory or Hub id; default: the recipe's model."
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Print the plan and check it; start nothing.")]
FactsOpt = Annotated[
    str | None,
    typer.Option(
        "--facts",
        metavar="FILE|NAME",
        help="Plan for another machine: a file that describes it, or a name that ships with astra, such as 8xl40.",
        autocompletion=complete_facts,
    ),
]
FleetFactsOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--facts",
        metavar="FILE|NAME",
        help="Plan for another machine: a file that describes it, or a name that ships with astra, such as 8xl40. "
        "Again for each further host of launch.hosts, in its order.",
        autocompletion=complete_facts,
    ),
]
RunDirOpt = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Run directory; default: runs/RECIPE-YYYYmmdd-HHMMSS.")
]
ResumeOpt = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Continue a run from its newest checkpoint. RUN is its name or directory.",
        autocompletion=complete_run,
    ),
]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="Run name or directory.", autocompletion=complete_run)]
OptionalRunArg = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="Run name or directory; default: the newest run.", autocompletion=complete_run),
]

RootOpt = Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder that holds the runs.", readable=False)]


SMALL = {"": "qwen3.5-tiny-m2po-delta", "sft": "tiny-sft"}
"""A recipe that runs anywhere, by command."""


def one_name(positional: str | None, option: str | None) -> str | None:
    """The recipe that a command line names, as an argument or as an option. Raises UserError when it names two."""
    if positional and option and positional != option:
        from astracli.config import recipe_io

        hint = recipe_io.SET_HINT if "=" in positional else "give one of them"
        raise UserError(f"two recipes given: `{positional}` and `--recipe {option}`", hint)
    return positional or option


def load_recipe(positional: str | None, option: str | None, overrides: list[str] | None, command: str) -> Recipe:
    """The recipe that a command line names, loaded with its overrides. Raises UserError."""
    from astracli.config import recipe_io

    name = one_name(positional, option)
    if name is None:
        raise UserError(
            "no recipe given",
            f"for example `astra {command} {SMALL.get(command, SMALL[''])}`; all: `astra recipes list`",
        )
    return recipe_io.load(name, overrides or ())


def the_run(text: str | None, *, training: bool = False) -> RunDir:
    """A run by name or path; None is the newest, with `training` the newest that trains if there is one. Raises
    UserError."""
    from astracli.plan.types import TRAINING
    from astracli.runs import find as runs

    if text is not None:
        return runs.named(text)
    found = runs.newest(commands=TRAINING if training else ())
    if found is None:
        raise UserError("no runs under `runs`", "start one with `astra train RECIPE`, or name a run directory")
    return found
