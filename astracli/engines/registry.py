"""Which engines are installed, and which one a recipe gets. Built-ins come in by the same door as strangers."""

from __future__ import annotations

from functools import cache

from astracli.config import doors
from astracli.config.recipe import Recipe
from astracli.engines.contract import ASKED, GROUP, Engine
from astracli.errors import UserError

HOW_TO_ADD = (
    f"an engine is a package with an entry point in `{GROUP}` that names an `astracli.engines.contract.Engine`; "
    "`pip install` it beside astracli"
)


@cache
def installed() -> tuple[doors.Installed[Engine], ...]:
    """Every engine of this environment, by name; broken ones carry their error."""
    return tuple(doors.installed(GROUP, Engine))


@cache
def get(name: str) -> Engine:
    """The engine of that name. Raises UserError: not installed (with the nearest), broken, or there twice."""
    return doors.get(installed(), name, "engine", HOW_TO_ADD)


def chosen(recipe: Recipe) -> tuple[Engine, str]:
    """(the engine that a recipe gets, the reason). Raises UserError."""
    if recipe.rollout.engine != "auto":
        return get(recipe.rollout.engine), ASKED
    device = recipe.device
    offered = [item.plugin for item in installed() if item.plugin is not None and device in item.plugin.auto_on]
    if len(offered) != 1:
        names = ", ".join(f"`{engine.name}`" for engine in offered) or "none"
        raise UserError(
            f"rollout.engine = auto: of the installed engines, {names} serve by themselves on {device}",
            "name one with `--set rollout.engine=NAME`",
        )
    return offered[0], offered[0].summary


def of(recipe: Recipe) -> Engine:
    """The engine that a recipe gets. Raises UserError."""
    return chosen(recipe)[0]
