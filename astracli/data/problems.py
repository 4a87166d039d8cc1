"""The problems of one set: a row's question, answer and turns, found by the names of its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from astracli.data.prompts import Problem
from astracli.data.rows import Row, open_rows
from astracli.data.turns import PromptFormat, RowError, Turn, lookup, refuse_like_turns, turns_of
from astracli.data.values import as_text
from astracli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Side = Literal["train", "held_out", "all"]
"""Rows that `data.holdout` leaves to training, those that it holds out, or both."""
TURNS_FIELD = "messages"
"""The column that is looked for where a row has no field of the recipe's name."""


class Problems(Sequence[Problem]):
    """The problems of a set, each read when it is asked for. A pass at the start looks at every row.

    The first of the field names that a row has is taken. In memory is what `rows` keeps, 8 bytes a row of a set of
    which some are held out, and while the pass goes on 24 bytes a row. Raises UserError for no rows, and for the first
    row without its fields.
    """

    def __init__(
        self,
        path: Path,
        *,
        split: str,
        config: str | None = None,
        question_fields: Sequence[str],
        answer_fields: Sequence[str],
        final_after: str | None = None,
        prompt: PromptFormat | None = None,
        holdout: float = 0.0,
        side: Side = "train",
    ):
        import numpy as np
        import xxhash

        self._path = path
        self._rows = open_rows(path, split, config)
        self._fields = (tuple(question_fields), tuple(answer_fields))
        self._final_after = final_after
        self._prompt = prompt or PromptFormat()
        self._renamed: dict[int, str] = {}
        self._places: np.ndarray | None = None
        """Rows of this side; None: all."""
        if not len(self._rows):
            raise UserError(f"`{path}` holds no rows")
        hashes = np.fromiter(self._look(bool(holdout)), np.dtype((np.uint64, 3)), len(self._rows))
        self.duplicates = len(hashes) - len(np.unique(hashes[:, 0]))
        """Rows whose question occurred before; they stay in."""
        self.fingerprint = xxhash.xxh64_hexdigest(np.ascontiguousarray(hashes[:, 0]).tobytes())
        """16 hex digits over the questions in their order: what a place in the set means."""
        self._rename(hashes[:, 1])
        if holdout and side != "all":
            self._places = self._side(hashes[:, 2], holdout, side)

    def _look(self, holdout: bool) -> Iterator[tuple[int, int, int]]:
        """Hashes of question, name, and the question without case and spacing, of every row."""
        for place, row in enumerate(self._rows):
            problem, asked = self._problem(place, row)
            yield _hash(asked), _hash(problem.id), _hash(f"held out\n{folded(asked)}") if holdout else 0

    def _side(self, hashes: np.ndarray, holdout: float, side: Side) -> np.ndarray:
        """Places of the rows to train on, or of one row for each question that is held out. Raises UserError."""
        import numpy as np

        asked = np.sort(np.unique(hashes))
        count = int(holdout) if holdout >= 1 else int(np.searchsorted(asked, np.uint64(int(holdout * 2**64))))
        if not 0 < count < len(asked):
            raise UserError(
                f"data.holdout = {holdout:g} holds {'all' if count else 'none'} of the {len(asked)} questions of "
                f"`{self._path}` out",
                "a share below 1, or a number of questions, that leaves some for both sides",
            )
        held = hashes <= asked[count - 1]
        if side == "train":
            return np.flatnonzero(~held)
        _, first = np.unique(hashes, return_index=True)
        return np.sort(first[held[first]])

    def _rename(self, hashes: np.ndarray) -> None:
        """A name that occurred before gets its row's number behind it: names are unique in a set."""
        import numpy as np

        taken, first = np.unique(hashes, return_index=True)
        given: set[str] = set()
        for place in np.setdiff1d(np.arange(len(hashes)), first, assume_unique=True):
            name = f"{self[int(place)].id}#{place}"
            while name in given or np.isin(np.uint64(_hash(name)), taken):
                name = f"{name}#{place}"
            given.add(name)
            self._renamed[int(place)] = name

    def _problem(self, place: int, row: Row) -> tuple[Problem, str]:
        """A row's problem, and all that it asks: what tells it from others."""
        try:
            turns = next((found for name in self._fields[0] if (found := _turns(row, name))), None)
            if turns is None and not any(_has(row, name) for name in self._fields[0]):
                turns = _turns(row, TURNS_FIELD)
            reference = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
            if turns is None:
                question = asked = _text(row, self._fields[0], "data.question_field")
                refuse_like_turns(next(name for name in self._fields[0] if _has(row, name)), question)
            else:
                question = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
                asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            answer = self._answer(row, reference)
            messages = self._prompt.messages(question if turns is None else turns, row)
        except RowError as error:
            hint = error.args[1] if len(error.args) > 1 else None
            said = str(error.args[0])
            between = " " if said.startswith("has ") else ": "
            raise UserError(f"{self._rows.where(place)}{between}{said}", hint) from None
        name = str(next((row[key] for key in ("id", "unique_id") if row.get(key) is not None), place))
        return Problem(self._renamed.get(place, name), question, answer, {}, messages, row), asked

    def _answer(self, row: Row, reference: str | None) -> str:
        """The right answer. Of chat turns whose last one is the assistant's, that one, where no column holds it."""
        names = self._fields[1]
        if not names:
            return reference or ""
        if reference is not None and not any(_has(row, name) for name in names):
            return reference
        answer = _text(row, names, "data.answer_field")
        if self._final_after and self._final_after in answer:
            answer = answer.rsplit(self._final_after, 1)[1].strip().replace(",", "")
        return answer

    def __len__(self) -> int:
        return len(self._rows) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, place: int) -> Problem: ...
    @overload
    def __getitem__(self, place: slice) -> list[Problem]: ...
    def __getitem__(self, place: int | slice) -> Problem | list[Problem]:
        places = range(len(self))[place]
        return [self._at(i) for i in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> Problem:
        row = place if self._places is None else int(self._places[place])
        return self._problem(row, self._rows.row(row))[0]

    def __iter__(self) -> Iterator[Problem]:
        if self._places is not None:
            return map(self._at, range(len(self)))
        return (self._problem(place, row)[0] for place, row in enumerate(self._rows))


def folded(text: str) -> str:
    """A question as far as `data.holdout` tells it from others."""
    return " ".join(text.split()).casefold()


def _hash(text: str) -> int:
    import xxhash

    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))


def _has(row: Mapping[str, Any], name: str) -> bool:
    try:
        return lookup(row, name) is not None
    except KeyError:
        return False


def _turns(row: Mapping[str, Any], name: str) -> list[Turn] | None:
    return turns_of(lookup(row, name)) if _has(row, name) else None


def _text(row: Mapping[str, Any], names: Sequence[str], setting: str) -> str:
    """The first of the named fields as text. Numbers lose a `.0`, lists are joined with `, `. Raises RowError."""
    missing = None
    for name in names:
        try:
            value = lookup(row, name)
        except KeyError:
            continue
        if value is None:
            missing = name
            continue
        if isinstance(value, list) and value and all(isinstance(v, str | int | float) for v in value):
            value = ", ".join(map(as_text, value))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"field `{name}` is {type(value).__name__}, not text")
        text = as_text(value)
        if text in ("inf", "-inf"):
            raise RowError(f"field `{name}` is a number that is not finite")
        if not text.strip():
            raise RowError(f"field `{name}` is empty")
        return text
    if missing is not None:
        raise RowError(f"field `{missing}` has no value", "fill it in, or leave the row out")
    others = ", ".join(f"`{name}`" for name in names[1:])
    wanted = f"`{names[0]}`" + (f" (nor {others}, which would be taken instead)" if others else "")
    there = ", ".join(f"`{key}`" for key in row) or "none"
    raise RowError(f"has no field {wanted}; its fields: {there}", f"name the right one with {setting}")
