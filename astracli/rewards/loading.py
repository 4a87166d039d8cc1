"""Find a reward by what a recipe says of it: `pkg.module:name`, or a name of the entry-point group `astra.rewards`."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from astracli.config import doors
from astracli.config.own_code import imported
from astracli.errors import UserError
from astracli.rewards.builtin import BUILTIN

ENTRY_POINT_GROUP = "astra.rewards"


def load_reward(spec: str) -> Callable[..., Any]:
    """The function, or the object of a class that was called without arguments. Raises UserError."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = imported(spec, f"reward `{spec}`", "pkg.module:function") if ":" in spec else _installed(spec)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:
            raise UserError(
                f"reward `{spec}`: making the class failed: {type(error).__name__}: {error}",
                "a class is made once in every grading process, without arguments, and then called",
            ) from error
    if not callable(found):
        raise UserError(f"reward `{spec}` is no function but {type(found).__name__}")
    return cast(Callable[..., Any], found)


def _installed(name: str) -> object:
    points = {point.name: point for point in doors.points(ENTRY_POINT_GROUP)}
    if name in points:
        try:
            return cast(object, points[name].load())
        except Exception as error:
            raise UserError(f"reward `{name}` ({points[name].value}) failed to load: {error!r}") from None
    known = sorted({*BUILTIN, *points})
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean `{near[0]}`? " if near else ""
    raise UserError(
        f"there is no reward `{name}`: {', '.join(f'`{k}`' for k in known)}",
        f"{meant}your own is `pkg.module:function` or an entry point in the group `{ENTRY_POINT_GROUP}`",
    )
