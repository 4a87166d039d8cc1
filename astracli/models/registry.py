"""Which model adapters are installed, and which one a recipe gets.

An adapter is an entry point in the group `astra.adapters` whose object is a `ModelAdapter`, built-in or not. One that
cannot be imported is listed with its error; the others still work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astracli.config import doors
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.models.adapter import ModelAdapter, read_config

GROUP = "astra.adapters"
HOW_TO_ADD = (
    f"an adapter is a package with an entry point in `{GROUP}` that names an `astracli.models.adapter.ModelAdapter`; "
    "`pip install` it beside astracli"
)
Installed = doors.Installed[ModelAdapter]


def to_json(item: Installed) -> dict[str, Any]:
    """An installed adapter as `astra adapters list --json` shows it."""
    return {
        "name": item.name,
        "package": item.package,
        "version": item.version,
        "entry_point": item.value,
        "model_types": list(item.plugin.model_types) if item.plugin else [],
        "summary": item.plugin.summary if item.plugin else "",
        "hybrid": bool(item.plugin and item.plugin.hybrid),
        "error": item.error,
    }


def installed() -> list[Installed]:
    """Every adapter of this environment, by name; broken ones carry their error."""
    return doors.installed(GROUP, ModelAdapter)


def get(name: str) -> ModelAdapter:
    """The adapter of that name. Raises UserError: not installed (with the nearest), broken, or there twice."""
    return doors.get(installed(), name, "adapter", HOW_TO_ADD)


def resolve(recipe: Recipe, config: Mapping[str, Any] | Path | None = None) -> ModelAdapter:
    """The adapter that a recipe gets, from config.json (a dict, or the checkpoint's directory).

    Without a config, `model.adapter = "auto"` can still be answered for the Hub ids that an adapter knows. Raises
    UserError when the adapter is not installed, is not for this model, or when none or several claim the model.
    """
    if isinstance(config, Path):
        config = read_config(config)
    model_type = config.get("model_type") if config is not None else None
    wanted, path, everything = recipe.model.adapter, recipe.model.path, installed()
    claiming = [item for item in everything if item.plugin and model_type in item.plugin.model_types]
    if wanted != "auto":
        adapter = get(wanted)
        if model_type is not None and adapter.model_types and model_type not in adapter.model_types:
            raise UserError(
                f"adapter `{wanted}` is for {_model_types(adapter)}, `{path}` is `{model_type}`",
                f"set model.adapter to {_names(claiming)}"
                if claiming
                else f"no installed adapter claims it; {HOW_TO_ADD}",
            )
        return adapter
    if model_type is None:
        for item in everything:
            if item.plugin is not None and path in item.plugin.known_configs:
                return item.plugin
        raise UserError(
            f"cannot tell which adapter `{path}` needs: its config.json is not on this machine",
            f"name one with `--set model.adapter=NAME` (installed: {_names(everything)})",
        )
    if not claiming:
        broken = [item for item in everything if item.error is not None]
        also = f" (broken: {_names(broken)})" if broken else ""
        there = [f"`{item.name}` ({_model_types(item.plugin) or 'by name only'})" for item in everything if item.plugin]
        raise UserError(
            f"no installed adapter claims model_type `{model_type}` of `{path}`; there is: {'; '.join(there)}{also}",
            f"a dense model may run with `--set model.adapter=generic`; {HOW_TO_ADD}",
        )
    if len(claiming) > 1:
        raise UserError(
            f"several adapters claim model_type `{model_type}`: {_names(claiming)}",
            f"choose one: `--set model.adapter={claiming[0].name}`",
        )
    return claiming[0].usable("adapter")


def _names(items: Sequence[Installed]) -> str:
    return ", ".join(f"`{item.name}`" for item in items)


def _model_types(adapter: ModelAdapter) -> str:
    return " and ".join(f"`{name}`" for name in adapter.model_types)
