"""How a reward is called: its parameters are bound by their names.

Three kinds of signatures are told apart by names alone:

- one completion a call: `problem, answer, completion, messages, tokens, row, group` and columns of the row;
- TRL's: `prompts, completions, completion_ids`, `log_extra, log_metric` and columns as lists over the group; returns a
  list (`rewards.trl`);
- verl's: `data_source, solution_str, ground_truth, extra_info`; or, in the plural, lists over the group.

A name that is neither is refused, with the columns that there are.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from astracli.errors import UserError
from astracli.rewards import trl
from astracli.rewards.types import GradeItem, NoScoreError

Style = Literal["one", "positional", "trl", "verl", "verl_batch"]

_ONE: dict[str, Callable[[GradeItem, Sequence[GradeItem]], Any]] = {
    "problem": lambda item, group: item.problem,
    "answer": lambda item, group: item.answer,
    "completion": lambda item, group: item.text,
    "messages": lambda item, group: item.turns,
    "tokens": lambda item, group: list(item.tokens or ()),
    "row": lambda item, group: item.row,
    "group": lambda item, group: [other.text for other in group],
}
"""Names that every reward may have, whatever columns there are. They come before a column of the same name."""
_VERL: dict[str, Callable[[GradeItem], Any]] = {
    "data_source": lambda item: item.row.get("data_source", ""),
    "solution_str": lambda item: item.text,
    "ground_truth": lambda item: _ground_truth(item),
    "extra_info": lambda item: item.row.get("extra_info", item.row),
}
_SHORT = (("problem", "answer", "completion"), 3)


def _ground_truth(item: GradeItem) -> Any:
    held = item.row.get("reward_model")
    return held["ground_truth"] if isinstance(held, Mapping) and "ground_truth" in held else item.answer


@dataclass(frozen=True)
class Binding:
    """A reward and how it wants to be called."""

    function: Callable[..., Any]
    style: Style
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_all: bool
    """Whether it has `**columns`."""
    concurrent: bool
    """`async def`."""
    asked: tuple[str, ...] = ()
    """The column that holds what is asked (`data.question_field`): whether it is a text or turns."""

    @property
    def grouped(self) -> bool:
        """Whether one call grades a whole group."""
        return self.style in ("trl", "verl_batch")

    @property
    def sees_group(self) -> bool:
        """Whether all samples of a prompt have to be graded by one process."""
        return self.grouped or "group" in self.names

    @property
    def names(self) -> tuple[str, ...]:
        return self.required + self.optional

    @property
    def needs(self) -> list[str]:
        """Which of `tokens`, `messages` and `row` have to be sent to the process."""
        if self.style == "positional":
            return []
        names = set(self.names)
        tokens = names & {"tokens", *trl.IDS} or (self.takes_all and self.grouped)
        plain = set(_ONE) - {"row"} | {"tokens"}
        row = self.takes_all or self.style != "one" or bool(names - plain)
        return [
            *(["tokens"] if tokens else []),
            *(["messages"] if names & {"messages", "prompts"} or (self.takes_all and self.style == "trl") else []),
            *(["row"] if row else []),
        ]

    def call(self, items: Sequence[GradeItem], place: int = 0, log: trl.Log | None = None) -> Any:
        """Call it for the item at `place` of a group, or for the whole group. `log`: gets what TRL's functions log."""
        if self.style == "positional":
            item = items[place]
            return self.function(item.problem, item.answer, item.text)
        if self.style == "trl":
            return self.function(**self._trl(items, log or trl.Log(len(items))))
        if self.style == "verl_batch":
            return self.function(**self._verl_batch(items))
        known = _ONE if self.style == "one" else {}
        item = items[place]
        given: dict[str, Any] = dict(item.row) if self.takes_all else {}
        for name in self.names:
            if name in known:
                given[name] = known[name](item, items)
            elif self.style == "verl" and name in _VERL:
                given[name] = _VERL[name](item)
            elif name in item.row:
                given[name] = item.row[name]
            elif name in self.required:
                raise NoScoreError(f"the row has no column `{name}`; its columns: {', '.join(item.row) or 'none'}")
        if self.takes_all:
            given |= {name: read(item) for name, read in _VERL.items() if self.style == "verl"}
            given |= {name: read(item, items) for name, read in known.items()}
        return self.function(**given)

    def _trl(self, items: Sequence[GradeItem], log: trl.Log) -> dict[str, Any]:
        whole, columns = trl.arguments(items, log, self.asked), trl.columns(items)
        given = {name: whole[name] for name in trl.NAMES if name in self.names or self.takes_all}
        for name in self.names:
            if name in columns and name not in trl.LOGS:
                given[name] = columns[name]
            elif name in _ONE and name != "completion":
                given[name] = [_ONE[name](item, items) for item in items]
            elif name not in whole and name in self.required:
                raise NoScoreError(f"the row has no column `{name}`; its columns: {', '.join(items[0].row) or 'none'}")
        return (columns | given) if self.takes_all else given

    def _verl_batch(self, items: Sequence[GradeItem]) -> dict[str, Any]:
        plural = {f"{name}s": [read(item) for item in items] for name, read in _VERL.items()}
        return plural if self.takes_all else {name: plural[name] for name in self.names if name in plural}


def bind(
    spec: str, function: Callable[..., Any], columns: Sequence[str] | None, where: str, asked: Sequence[str] = ()
) -> Binding:
    """How `function` is called. `columns`: of the rows of `where`, None when not known; `asked`: the one that holds the
    question. Raises UserError."""
    concurrent = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", 0))  # noqa: B004
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return Binding(function, "positional", (), (), False, concurrent)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in named}
    required = tuple(p.name for p in named if p.default is p.empty)
    optional = tuple(p.name for p in named if p.default is not p.empty)
    if _by_position(parameters, required):
        return Binding(function, "positional", (), (), False, concurrent)
    style: Style = "one"
    if names & {"completions", "prompts", "environments", *trl.IDS}:
        style = "trl"
    elif "solution_str" in names:
        style = "verl"
    elif "solution_strs" in names:
        style = "verl_batch"
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise UserError(
            f"reward `{spec}` has parameters without names ({inspect.signature(function)}), they are bound by name",
            "leave the `/` out, or take exactly three: problem, answer, completion",
        )
    binding = Binding(function, style, required, optional, takes_all, concurrent, tuple(asked))
    if columns is not None:
        _check(spec, binding, columns, where)
    return binding


def _by_position(parameters: Sequence[inspect.Parameter], required: Sequence[str]) -> bool:
    """Three parameters without names, or with short ones in this order: `p, a, c`, `prob, ans, comp`."""
    words, count = _SHORT
    three = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if len(three) != count:
        return False
    if all(p.kind is p.POSITIONAL_ONLY for p in three):
        return True
    return all(w.startswith(p.name) for w, p in zip(words, three, strict=True)) and set(required) != set(words)


def _check(spec: str, binding: Binding, columns: Sequence[str], where: str) -> None:
    known: dict[Style, Sequence[str]] = {
        "one": list(_ONE),
        "trl": [*trl.NAMES, *(name for name in _ONE if name != "completion")],
        "verl": list(_VERL),
        "verl_batch": [f"{name}s" for name in _VERL],
    }
    names = known[binding.style]
    usable = [*names, *(() if binding.style == "verl_batch" else columns)]
    absent = [name for name in binding.required if name not in usable]
    if not absent:
        return
    if binding.style == "trl" and (of_trl := next((name for name in absent if name in trl.ABSENT), None)):
        what, hint = trl.ABSENT[of_trl]
        raise UserError(f"reward `{spec}` has the parameter `{of_trl}`: {what}", hint)
    near = difflib.get_close_matches(absent[0], usable, n=1)
    meant = f"did you mean `{near[0]}`? " if near else ""
    there = ", ".join(f"`{name}`" for name in columns) or "none"
    raise UserError(
        f"reward `{spec}` has the parameter `{absent[0]}`, which is no column of {where} (columns: {there})",
        f"{meant}parameters are bound by name: {', '.join(names)}, or a column",
    )
