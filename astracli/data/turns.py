"""From a row to the chat turns of its prompt: columns by name, the recipe's system turn, examples and template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from astracli.data.values import as_text

if TYPE_CHECKING:
    from astracli.config.recipe_data import DataTable

Turn = dict[str, Any]
"""`role` and `content` (text), and whatever else a chat template may look at."""
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_SURELY_MEANT = re.compile(r"(?<![\\\w}^])\{([A-Za-z_][\w.]*)\}")
"""A name in braces that are not those of TeX, as `\\frac{a}{b}` and `x^{n}` have them."""


_LIKE_TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|from|content)["']\s*:""")
"""How chat turns begin, as JSON or as Python writes a list."""


class RowError(ValueError):
    """What is wrong with a row, without its place."""


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """A column, or the field `b` inside the column `a` for `a.b`. Raises KeyError when there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def turns_of(value: Any) -> list[Turn] | None:
    """The chat turns that a column holds, as a list or as its JSON text; None when it holds something else.

    Raises RowError for turns that no chat template can take.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value):
        return None
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def refuse_like_turns(name: str, text: str) -> None:
    """Raise RowError for the text of column `name` that begins as chat turns do and could not be read as such."""
    if _LIKE_TURNS.match(text):
        raise RowError(
            f"field `{name}` begins like chat turns, {text.strip()[:40]!r}, and is no list of them",
            'write the whole list as JSON, [{"role": "user", "content": "..."}]: json.dumps does, str() and '
            "pandas' to_csv do not; text that is to be asked as it stands goes in by the template: "
            f"data.template={{{name}}}, with another column as data.question_field",
        )


def _turn(turn: Mapping[str, Any], number: int) -> Turn:
    role, content = turn["role"], turn["content"]
    if not isinstance(role, str):
        raise RowError(f"turn {number} has the role {role!r}, which is not text")
    if isinstance(content, list):
        kinds = {part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise RowError(f"turn {number} holds `{min(kinds - {'text'})}`; only text can be asked")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of turn {number} is {type(content).__name__}, not text")
    kept = {key: value for key, value in turn.items() if value is not None}  # columns of Arrow fill in what is absent
    return kept | {"role": role, "content": content or ""}


def render(template: str, question: str, row: Mapping[str, Any] | None = None) -> str:
    """Put a question and columns into a template, in one pass: braces in a question stay as they are, and so does
    everything in braces that is no column (`\\boxed{}`). Raises RowError for a column without a value."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name == "question":
            return question
        try:
            held = lookup(row or {}, name)
        except KeyError:
            return found[0]
        if held is None:
            raise RowError(f"field `{name}`, which the recipe's prompt names, has no value")
        return as_text(held) if isinstance(held, str | int | float) else json.dumps(held, ensure_ascii=False)

    return _PLACEHOLDER.sub(value, template)


@dataclass(frozen=True)
class PromptFormat:
    """What a recipe puts around a question."""

    template: str = "{question}"
    system: str | None = None
    few_shot: tuple[tuple[str, str], ...] = ()
    """(question, answer)"""

    @classmethod
    def of(cls, data: DataTable) -> PromptFormat:
        return cls(data.template, data.system, tuple((shot.question, shot.answer) for shot in data.few_shot))

    @property
    def own_text(self) -> str:
        """Everything that the recipe itself says."""
        return "\n".join([self.template, self.system or "", *(part for shot in self.few_shot for part in shot)])

    def messages(self, question: str | Sequence[Turn], row: Mapping[str, Any]) -> tuple[Turn, ...]:
        """The turns that the chat template gets. `question`: its text, or the row's own turns, whose last one asks.

        A row's own system turn comes before the recipe's. Raises RowError.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else [dict(t) for t in question]
        system = [turns.pop(0)] if turns and turns[0]["role"] == "system" else []
        if not turns or turns[-1]["role"] not in ("user", "tool"):
            last = turns[-1]["role"] if turns else "system"
            raise RowError(f"its turns end with one of `{last}`: nothing is asked")
        if turns[-1]["role"] == "user" and self.template != "{question}":
            turns[-1] = turns[-1] | {"content": self._rendered(self.template, turns[-1]["content"], row)}
        if not system and self.system is not None:
            system = [{"role": "system", "content": self._rendered(self.system, "", row)}]
        shown = [
            {"role": role, "content": content}
            for asked, answer in self.few_shot
            for role, content in (("user", self._rendered(self.template, asked, row)), ("assistant", answer))
        ]
        return (*system, *shown, *turns)

    def _rendered(self, template: str, question: str, row: Mapping[str, Any]) -> str:
        for name in _SURELY_MEANT.findall(template):
            if name != "question":
                try:
                    lookup(row, name)
                except KeyError:
                    there = ", ".join(f"`{key}`" for key in row) or "none"
                    raise RowError(f"no field `{name}`, which the recipe's prompt names; its fields: {there}") from None
        return render(template, question, row)
