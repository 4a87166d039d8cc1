"""What a comparison depends on besides the two answers. See docs/grading.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conventions:
    """What the comparison depends on besides the two answers."""

    tolerance: float = 0.0
    """Relative difference of numbers that still counts as equal."""
    ordered: bool = False
    """Whether a list without brackets has an order."""
    units_required: bool = False
    percent_asked: bool = False
    """The problem asks for a percentage: a bare number is one."""
    list_asked: bool = False
    """The problem asks for values and not for an interval: `[3, 5]` is a list."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Conventions:
        """From the table `data.grading` of a recipe, as a document; keys that are left out keep their default."""
        return cls(
            tolerance=float(settings.get("relative_tolerance", 0.0)),
            ordered=bool(settings.get("ordered_lists", False)),
            units_required=settings.get("units", "optional") == "required",
        )


DEFAULTS = Conventions()
