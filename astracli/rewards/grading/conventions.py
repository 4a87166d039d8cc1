"""What a comparison depends on besides the two answers; docs/grading.md explains each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conventions:
    """The first three are settings of a recipe, `data.grading`. The others come from the text of the problem."""

    relative_tolerance: float = 0.0
    """Relative difference of numbers that still counts as equal."""
    ordered_lists: bool = False
    """Whether a list without brackets has an order."""
    units: Literal["optional", "required"] = "optional"
    """`required`: a gold with a unit is not matched by a bare number."""
    percent_asked: bool = False
    """The problem asks for a percentage: a bare number is one."""
    list_asked: bool = False
    """The problem asks for values and not for an interval: `[3, 5]` is a list."""


DEFAULTS = Conventions()
