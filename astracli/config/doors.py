"""Doors: entry-point groups by which packages bring adapters, engines and more. Built-ins come in by the same door.

One that cannot be imported is listed with its error and hurts nobody else.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe_run import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Installed(Generic[T]):
    """One entry point of a group, loaded or broken."""

    name: str
    value: str
    """`module:attribute` of the entry point."""
    package: str
    version: str
    plugin: T | None
    error: str | None
    """Why it could not be loaded; None when it could."""

    def usable(self, noun: str) -> T:
        """What was loaded. Raises UserError for one that is broken."""
        if self.plugin is None:
            raise UserError(
                f"{noun} `{self.name}` of package `{self.package}` {self.version} is broken: {self.error}",
                f"mend or uninstall it: `pip uninstall {self.package}`",
            )
        return self.plugin


def points(group: str) -> list[metadata.EntryPoint]:
    """Every entry point of the group in this environment, by name; nothing is loaded."""
    return sorted(_every(tuple(sys.path)).select(group=group), key=lambda point: point.name)


@cache  # each package in the search path has a file of them
def _every(search_path: tuple[str, ...]) -> Any:
    return metadata.entry_points()  # of another type in Python 3.11; `select(group=...)` gives EntryPoints in both


def names(group: str) -> list[str]:
    """Of every entry point of the group; nothing is loaded."""
    return list(dict.fromkeys(point.name for point in points(group)))


def installed(group: str, kind: type[T]) -> list[Installed[T]]:
    """Every entry point of the group in this environment, by name; broken ones carry their error."""
    return sorted((_load(point, kind) for point in points(group)), key=lambda item: (item.name, item.package))


def _load(point: metadata.EntryPoint, kind: type[T]) -> Installed[T]:
    plugin, error = None, None
    try:
        found = point.load()
    except Exception as failure:  # a stranger's module may raise anything while it is imported
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    else:
        if isinstance(found, kind):
            plugin = found
        else:
            error = f"{point.value} is a {type(found).__name__}, not an {kind.__module__}.{kind.__qualname__}"
    package, version = "unknown", "unknown"
    if point.dist is not None:
        head = point.dist.metadata  # reads and parses a file
        package, version = head["Name"], head["Version"]
    return Installed(point.name, point.value, package, version, plugin, error)


def get(everything: Sequence[Installed[T]], name: str, noun: str, how_to_add: str) -> T:
    """The one of that name. Raises UserError: not installed (with the nearest), broken, or there twice."""
    found = [item for item in everything if item.name == name]
    if not found:
        names = sorted({item.name for item in everything})
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        raise UserError(f"no {noun} `{name}` is installed (there is: {', '.join(names) or 'none'}){guess}", how_to_add)
    if len(found) > 1:
        packages = " and ".join(f"`{item.package}`" for item in found)
        raise UserError(f"{noun} `{name}` comes from two packages: {packages}", "uninstall one of them")
    return found[0].usable(noun)


@cache
def settings(group: str) -> dict[str, type[Table]]:
    """Name -> the table that a recipe may hold for it, of everything in the group that can be loaded."""
    from astracli.config.recipe_run import Table

    found = {item.name: getattr(item.plugin, "settings", None) for item in installed(group, object)}
    return {name: own for name, own in found.items() if isinstance(own, type) and issubclass(own, Table)}
