"""Which model adapters are installed, and which one a recipe gets.

An adapter is an entry point in the group `astra.adapters` whose object is a `ModelAdapter`, built-in or not. One that
cannot be imported is listed with its error; the others still work.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.models.adapter import ModelAdapter, read_config

GROUP = "astra.adapters"
HOW_TO_ADD = (
    f"an adapter is a package with an entry point in `{GROUP}` that names an `astracli.models.adapter.ModelAdapter`; "
    "`pip install` it beside astracli"
)


@dataclass(frozen=True)
class Installed:
    """One entry point of the group, loaded or broken."""

    name: str
    value: str
    """`module:attribute` of the entry point."""
    package: str
    version: str
    adapter: ModelAdapter | None
    error: str | None
    """Why it could not be loaded; None when it could."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "package": self.package,
            "version": self.version,
            "entry_point": self.value,
            "model_types": list(self.adapter.model_types) if self.adapter else [],
            "summary": self.adapter.summary if self.adapter else "",
            "hybrid": bool(self.adapter and self.adapter.hybrid),
            "error": self.error,
        }


def installed() -> list[Installed]:
    """Every adapter of this environment, by name; broken ones carry their error."""
    points = metadata.entry_points(group=GROUP)
    return sorted((_load(point) for point in points), key=lambda item: (item.name, item.package))


def _load(point: metadata.EntryPoint) -> Installed:
    adapter, error = None, None
    try:
        found = point.load()
    except Exception as failure:  # a foreign module may raise anything while it is imported
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    else:
        if isinstance(found, ModelAdapter):
            adapter = found
        else:
            error = f"{point.value} is a {type(found).__name__}, not an astracli.models.adapter.ModelAdapter"
    package = point.dist.name if point.dist is not None else "unknown"
    version = point.dist.version if point.dist is not None else "unknown"
    return Installed(point.name, point.value, package, version, adapter, error)


def get(name: str) -> ModelAdapter:
    """The adapter of that name. Raises UserError: not installed (with the nearest), broken, or there twice."""
    everything = installed()
    found = [item for item in everything if item.name == name]
    if not found:
        names = sorted({item.name for item in everything})
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        raise UserError(f"no adapter `{name}` is installed (there is: {', '.join(names) or 'none'}){guess}", HOW_TO_ADD)
    if len(found) > 1:
        packages = " and ".join(f"`{item.package}`" for item in found)
        raise UserError(f"adapter `{name}` comes from two packages: {packages}", "uninstall one of them")
    return _usable(found[0])


def _usable(item: Installed) -> ModelAdapter:
    if item.adapter is None:
        raise UserError(
            f"adapter `{item.name}` of package `{item.package}` {item.version} is broken: {item.error}",
            f"mend or uninstall it: `pip uninstall {item.package}`",
        )
    return item.adapter


def resolve(recipe: Recipe, config: Mapping[str, Any] | Path | None = None) -> ModelAdapter:
    """The adapter that a recipe gets, from config.json (a dict, or the checkpoint's directory).

    Without a config, `model.adapter = "auto"` can still be answered for the Hub ids that an adapter knows. Raises
    UserError when the adapter is not installed, is not for this model, or when none or several claim the model.
    """
    if isinstance(config, Path):
        config = read_config(config)
    model_type = config.get("model_type") if config is not None else None
    wanted = recipe.model.adapter
    if wanted != "auto":
        adapter = get(wanted)
        if model_type is not None and adapter.model_types and model_type not in adapter.model_types:
            others = _names(_claiming(installed(), model_type))
            raise UserError(
                f"adapter `{wanted}` is for {_words(adapter.model_types)}, `{recipe.model.path}` is `{model_type}`",
                f"set model.adapter to {others}" if others else f"no installed adapter claims it; {HOW_TO_ADD}",
            )
        return adapter
    everything = installed()
    if model_type is None:
        return _by_hub_id(recipe.model.path, everything)
    claiming = _claiming(everything, model_type)
    if not claiming:
        broken = [item for item in everything if item.error is not None]
        also = f" (broken: {_names(broken)})" if broken else ""
        raise UserError(
            f"no installed adapter claims model_type `{model_type}` of `{recipe.model.path}`; there is: "
            f"{'; '.join(_described(item) for item in everything if item.adapter)}{also}",
            f"a dense model may run with `--set model.adapter=generic`; {HOW_TO_ADD}",
        )
    if len(claiming) > 1:
        raise UserError(
            f"several adapters claim model_type `{model_type}`: {_names(claiming)}",
            f"choose one: `--set model.adapter={claiming[0].name}`",
        )
    return _usable(claiming[0])


def _claiming(everything: Sequence[Installed], model_type: str) -> list[Installed]:
    return [item for item in everything if item.adapter is not None and model_type in item.adapter.model_types]


def _by_hub_id(path: str, everything: Sequence[Installed]) -> ModelAdapter:
    for item in everything:
        if item.adapter is not None and path in item.adapter.known_configs:
            return item.adapter
    raise UserError(
        f"cannot tell which adapter `{path}` needs: its config.json is not on this machine",
        f"name one with `--set model.adapter=NAME` (installed: {_names(everything)})",
    )


def _described(item: Installed) -> str:
    claims = _words(item.adapter.model_types) if item.adapter and item.adapter.model_types else "by name only"
    return f"`{item.name}` ({claims})"


def _names(items: Sequence[Installed]) -> str:
    return ", ".join(f"`{item.name}`" for item in items)


def _words(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
