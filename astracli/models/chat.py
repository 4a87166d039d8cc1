"""Chat turns to token ids, by the chat template of the checkpoint: thinking, further arguments, how an answer begins.

What the turns say is text. A special token's name in them (`<|im_end|>`) becomes the letters that it is written with,
unless `markup` is `tokens`: a question cannot end its own turn. (Added tokens that a tokenizer does not call special,
such as `<think>` of Qwen3, are vocabulary like any other and stay tokens.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import reading
from astracli.models.rendering import FILES, applied

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe

THINKING = "enable_thinking"
"""The argument by which chat templates switch reasoning."""
_PRIVATE = 0xF0000
"""First of the code points that stand for a special token's name while the template is filled in: private use, in no
text that anybody writes."""


@dataclass(frozen=True)
class ChatFormat:
    """What a recipe says of the prompt besides its turns."""

    thinking: bool = False
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    assistant_prefix: str = ""
    markup: str = "text"
    """`text` or `tokens`: what a special token's name in a turn becomes."""

    @classmethod
    def of(cls, recipe: Recipe) -> ChatFormat:
        model = recipe.model
        return cls(model.thinking == "on", model.template_args, model.assistant_prefix, recipe.data.markup)

    def tokens(
        self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of the prompt that these turns make, up to where the answer begins. `tools`: JSON schemas of
        functions, for templates that take them.

        A tokenizer without a chat template gets the bare text of the turns.
        """
        turns, back = self.hidden(tokenizer, messages)
        bare = not has_template(tokenizer)  # what a template does not write, the tokenizer adds: BOS
        return self.encoded(tokenizer, self.render(tokenizer, turns, tools=tools), back, begins=bare)

    def render(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        generate: bool = True,
    ) -> str:
        """The text of some turns, with `generate` up to where the next answer begins. Raises what the template
        raises, and TooMuch (`models/rendering.py`)."""
        begins = self.assistant_prefix if generate else ""
        if not has_template(tokenizer):
            return bare_text(messages) + begins
        options = {THINKING: self.thinking, **self.template_args}
        given = {"tools": [dict(tool) for tool in tools]} if tools else {}
        return applied(tokenizer, messages, add_generation_prompt=generate, **given, **options) + begins

    def hidden(
        self, tokenizer: Any, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
        """(the turns with a private character for each special token's name in them, {character: name})"""
        names = special_names(tokenizer) if self.markup == "text" else ()
        found = [name for name in names if any(name in str(turn["content"]) for turn in messages)]
        base = _free(messages)
        stands_for = {name: chr(base + number) for number, name in enumerate(found)}
        back = {mark: name for name, mark in stands_for.items()}
        return [_replaced(turn, stands_for) for turn in messages], back

    def encoded(self, tokenizer: Any, text: str, back: Mapping[str, str], *, begins: bool = False) -> list[int]:
        """Token ids of a text; private characters become the letters of the names that they stand for. `begins`: the
        tokenizer adds what it puts before a text of its own."""
        if not back:
            return list((tokenizer(text) if begins else tokenizer(text, add_special_tokens=False))["input_ids"])
        ids: list[int] = []
        for number, part in enumerate(re.split(f"([{''.join(back)}])", text)):
            if part in back:
                ids += _letters(tokenizer, back[part])
            elif part or not number:
                ids += tokenizer(part, add_special_tokens=begins and not number)["input_ids"]
        return ids


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def bare_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Turns for a model without a chat template: an answer follows its question, a blank line ends both."""
    text = ""
    for number, turn in enumerate(messages):
        content, last = str(turn["content"]), number == len(messages) - 1
        follows = not last and turn["role"] == "user" and messages[number + 1]["role"] == "assistant"
        text += content
        if not last:
            text += ("" if content[-1:].isspace() else " ") if follows else "\n\n"
    return text


def special_names(tokenizer: Any) -> tuple[str, ...]:
    """How the special tokens of a tokenizer are written, longest first: one may contain another."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    names = {token.content for token in added.values() if token.special}
    return tuple(sorted(names - {""}, key=lambda name: (-len(name), name)))


def special_names_of(folder: Path) -> tuple[str, ...]:
    """`special_names` of a checkpoint directory, from its tokenizer.json alone; () where there is none."""
    try:
        document = reading.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return tuple(token["content"] for token in document.get("added_tokens", ()) if token.get("special"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def template_of(folder: Path) -> str:
    """The text of the chat template in a checkpoint directory; "" without one."""
    for name in FILES:
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            found = text if name.endswith(".jinja") else reading.from_json(text).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if found:
            return found if isinstance(found, str) else json.dumps(found)
    return ""


def _free(messages: Sequence[Mapping[str, Any]]) -> int:
    """A code point from which on none occurs in the turns."""
    text = "".join(str(turn["content"]) for turn in messages)
    return max([_PRIVATE, *(ord(letter) + 1 for letter in text if ord(letter) >= _PRIVATE)])


def _replaced(turn: Mapping[str, Any], stands_for: Mapping[str, str]) -> Mapping[str, Any]:
    content = turn["content"]
    for name, mark in stands_for.items():
        content = str(content).replace(name, mark)
    return {**turn, "content": content}


def _letters(tokenizer: Any, name: str) -> list[int]:
    """Token ids of a special token's name as text: encoded in two pieces, neither of which is the token."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for cut in range(1, len(name)):
        ids = [
            token
            for part in (name[:cut], name[cut:])
            for token in tokenizer(part, add_special_tokens=False)["input_ids"]
        ]
        if not special & set(ids) or cut == len(name) - 1:
            return ids
    return list(tokenizer(name, add_special_tokens=False)["input_ids"])
