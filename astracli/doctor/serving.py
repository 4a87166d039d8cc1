"""The engine: what it says of its environment, which may have its own Python."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject
from astracli.engines import registry as engines


def checks(subject: Subject) -> Iterator[Check]:
    """Of the recipe's engine; without a recipe of every one that has something to install."""
    if subject.recipe is not None:
        asked = [subject.engine] if subject.engine is not None else []
    else:
        asked = [item.plugin for item in engines.installed() if item.plugin is not None and item.plugin.package]
    for engine in asked:
        yield from engine.checks(subject.case(engine))
