"""What a reward returned, read as a score: a number, a mapping with other figures to log, or a list over a group."""

from __future__ import annotations

import math
import resource
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from astracli.rewards.binding import Binding
from astracli.rewards.trl import Log
from astracli.rewards.types import NoScoreError

DETAIL_CHARACTERS = 4000
"""Of an error's traceback: its beginning and its end."""
MOST_PARTS = 64
"""Figures that a reward may log beside its score, and texts besides."""
MEMORY_KEY = "`data.reward_memory_gib`; fixed for mathematics"
NAME_CHARACTERS, NOTE_CHARACTERS = 100, 1000
"""Of the name and the text of what is logged; the rest of a longer one is left out."""


class Scored(NamedTuple):
    """One reward's view of one completion, as it travels."""

    reward: float
    state: str
    """`scored`, `right`, `wrong`, `no_answer`, `timeout`, `error`, or `absent`: it does not apply to the row."""
    detail: str = ""
    logged: dict[str, float] = {}  # noqa: RUF012, never written to
    notes: dict[str, str] = {}  # noqa: RUF012, never written to


def failed(error: BaseException) -> Scored:
    """The verdict of an exception, with its traceback from the reward's own frames on."""
    frames = error.__traceback__
    while frames is not None and "astracli" in frames.tb_frame.f_code.co_filename.replace("\\", "/").split("/"):
        frames = frames.tb_next
    if isinstance(error, NoScoreError) or frames is None:
        return Scored(0.0, "error", shortened(_words(error)))
    try:
        # the message by itself: an exception may say megabytes, which `traceback` would copy line by line
        lines = ["Traceback (most recent call last):\n", *traceback.format_tb(frames, 12)]
        text = "".join(lines) + _words(error)
    except Exception:
        text = _words(error)
    return Scored(0.0, "error", shortened(text))


def _words(error: BaseException) -> str:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if isinstance(error, MemoryError) and limit != resource.RLIM_INFINITY:
        return f"MemoryError: more than the {limit / (1 << 30):.3g} GiB that this process may take ({MEMORY_KEY})"
    try:
        said = str(error)[: 2 * DETAIL_CHARACTERS]
    except Exception:
        said = "<its text cannot be made>"
    if isinstance(error, NoScoreError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def shortened(text: str) -> str:
    half = DETAIL_CHARACTERS // 2
    return text if len(text) <= DETAIL_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"


def printable(text: str) -> str:
    """Text of a reward for terminals and logs: line ends and tabs stay, other control characters are written out."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def one(binding: Binding, returned: Any) -> Scored:
    """The score of a single completion. Raises NoScoreError."""
    if isinstance(returned, Mapping):
        return _mapping(binding, returned)
    return Scored(_number(returned), "scored")


def many(binding: Binding, returned: Any, count: int, log: Log | None = None) -> list[Scored]:
    """The scores of a group, with what was logged of it. Raises NoScoreError. None in the list: the reward does not
    apply to that row (TRL)."""
    if (
        isinstance(returned, str | bytes | Mapping)
        or not hasattr(returned, "__len__")
        or not hasattr(returned, "__iter__")
    ):
        raise NoScoreError(
            f"the reward returned {_what(returned)}; with this signature it is a list, one score a completion"
        )
    if len(returned) != count:
        raise NoScoreError(f"the reward returned {len(returned)} scores for {count} completions")
    found = []
    for value in returned:
        try:
            found.append(Scored(0.0, "absent") if value is None else one(binding, value))
        except NoScoreError as error:
            found.append(failed(error))
    return found if log is None else [_with(scored, log.of(place)) for place, scored in enumerate(found)]


def _with(scored: Scored, logged: Mapping[str, Any]) -> Scored:
    figures, notes = _sorted(logged)
    return scored._replace(logged=scored.logged | figures, notes=scored.notes | notes)


def _mapping(binding: Binding, returned: Mapping[Any, Any]) -> Scored:
    key = "score" if binding.style in ("verl", "verl_batch") else "reward"
    if key not in returned:
        names = ", ".join(f"`{name}`" for name in list(returned)[:10])
        raise NoScoreError(f"the reward returned a mapping without `{key}`: {names or 'it is empty'}")
    figures, notes = _sorted({name: value for name, value in returned.items() if name != key})
    return Scored(_number(returned[key]), "scored", "", figures, notes)


def _sorted(logged: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """(figures, texts) of what a reward logs. None and numbers that are not finite are neither."""
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for key, value in logged.items():
        name = str(key)[:NAME_CHARACTERS]
        if isinstance(value, str | bytes) or (value is not None and not _is_number(value)):
            if len(notes) < MOST_PARTS:
                notes[name] = str(value)[:NOTE_CHARACTERS]
        elif (figure := _figure(value)) is not None and len(figures) < MOST_PARTS:
            figures[name] = figure
    return figures, notes


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several elements
        return False
    return True


def _figure(value: Any) -> float | None:
    if isinstance(value, str | bytes):
        return None
    try:
        figure = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return figure if math.isfinite(figure) else None


def _number(value: Any) -> float:
    if isinstance(value, str | bytes | Sequence) or value is None:
        raise NoScoreError(f"the reward returned {_what(value)}, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise NoScoreError(f"the reward returned {_what(value)}, not a number") from None
    except OverflowError:
        raise NoScoreError("the reward returned an integer that is too large") from None
    if not math.isfinite(number):
        raise NoScoreError(f"the reward is {number}")
    return number


def _what(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
