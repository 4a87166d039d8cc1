"""A chat whose assistant turns are drawn: the tokens that stand between them, by the model's own chat template.

Token in, token out: what was drawn stays as it was drawn. Of each further turn only the new part is written and
tokenised: what closes the assistant's turn, the new turns, and what opens the assistant's next one. So a template that
writes earlier turns otherwise than they were drawn (thinking cut out, spaces trimmed, calls of tools put together anew)
changes no token of an episode.

This needs a template that can be rendered in parts: what it writes behind a turn may depend on nothing before it.
`Conversation.check` proves this by trial, and says what is wrong otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from astracli.errors import UserError
from astracli.models.chat import ChatFormat, has_template
from astracli.models.rendering import TooMuch

Message = Mapping[str, Any]
MARK = "qvZanswerXwq"
"""An answer of the trial. Only letters: nothing trims, splits or escapes them."""
_SAID = ("qvZfirstXwq", "qvZsecondXwq")
_HISTORY: tuple[Message, ...] = ({"role": "user", "content": "qvZquestionXwq"},)
_EARLIER: tuple[Message, ...] = (
    {"role": "user", "content": "qvZearlierXwq"},
    {"role": "assistant", "content": "qvZreplyXwq"},
)
_SYSTEM: tuple[Message, ...] = ({"role": "system", "content": "qvZsystemXwq"},)
_TOOL = {
    "type": "function",
    "function": {
        "name": "qvZtoolXwq",
        "description": "-",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "-"}}, "required": []},
    },
}
_CASES = list(product(((), _SYSTEM), ((), _EARLIER), ((), (_TOOL,))))
"""Everything that may stand before an answer, in all combinations."""
HINT = (
    "use a chat_template.jinja that can be, or an environment that adds its own tokens between turns (`Episode.tell`)"
)


class Conversation:
    """The chat template of a tokenizer, applied in parts."""

    def __init__(self, tokenizer: Any, chat: ChatFormat, tools: Sequence[Mapping[str, Any]] = ()):
        """`tools`: JSON schemas of functions that the prompt names."""
        self._tokenizer, self._chat, self._tools = tokenizer, chat, tools
        self._special = set(getattr(tokenizer, "all_special_ids", None) or ())

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the first answer begins."""
        return self._chat.tokens(self._tokenizer, messages, self._tools)

    def after(self, turn: Sequence[int], new: Sequence[Message]) -> list[int]:
        """Token ids that follow a drawn turn: its close, the new turns, and what opens the next answer.

        A turn that has drawn the special token that closes it is not closed again.
        """
        hidden, back = self._chat.hidden(self._tokenizer, new)
        ids = self._chat.encoded(self._tokenizer, self._behind(_HISTORY, hidden, ()), back)
        closed = len(turn) > 0 and int(turn[-1]) in self._special and bool(ids) and ids[0] in self._special
        return ids[1:] if closed else ids

    def check(self, role: str) -> None:
        """Raises UserError, with the reason, unless turns of `role` can be added behind an answer."""
        if reason := self._obstacle(role):
            raise UserError(f"the model's chat template cannot be rendered in parts: {reason}", HINT)

    def _behind(self, history: Sequence[Message], new: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """What follows the answer MARK to a history. Raises ValueError when it is not there once."""
        parts = self._whole(history, new, tools).split(MARK)
        if len(parts) != 2:
            raise ValueError("it leaves out what the assistant has said, or repeats it")
        return parts[1]

    def _whole(self, history: Sequence[Message], new: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        turns = [*history, {"role": "assistant", "content": MARK}, *new]
        return self._chat.render(self._tokenizer, turns, tools=tools)

    def _obstacle(self, role: str) -> str | None:
        """Why turns of a role cannot be added; None when they can."""
        if not has_template(self._tokenizer):
            return None
        new = [{"role": role, "content": text} for text in (_SAID if role == "tool" else _SAID[:1])]
        try:
            behind = self._behind(_HISTORY, new, ())
        except TooMuch:
            raise
        except Exception as error:  # whatever the template raises
            return f"a turn of `{role}` behind an answer: {error}"
        places = [behind.find(str(turn["content"])) for turn in new]
        if -1 in places or places != sorted(places):
            return f"it does not write what a turn of `{role}` says behind the answer before"
        for system, earlier, tools in _CASES:
            history = [*system, *earlier, *_HISTORY]
            try:
                start = self._chat.render(self._tokenizer, history, tools=tools, generate=False)
                whole, other = self._whole(history, new, tools), self._behind(history, new, tools)
            except TooMuch:
                raise
            except Exception:  # a template without a system turn, or without tools: nothing to compare
                continue
            if other != behind:
                given = {"the system turn": system, "earlier turns": earlier, "the tools": tools}
                names = " and ".join(name for name, there in given.items() if there)
                return f"what it writes behind an answer depends on {names}"
            if not whole.startswith(start):
                return "it writes the prompt otherwise once another turn follows"
        whole_ids = self._ids(self._whole(_HISTORY, new, ()))
        ids = self._ids(behind)
        if whole_ids[len(whole_ids) - len(ids) :] != ids:
            return "the tokenizer splits a text otherwise when it begins anew behind an answer"
        return None

    def _ids(self, text: str) -> list[int]:
        return self._chat.encoded(self._tokenizer, text, {})
