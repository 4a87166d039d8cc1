"""How a model writes calls of tools, one class a format, and which of them a chat template uses.

A parser gets the text of a turn, special tokens included, and finds calls and what was meant as one. Reasoning is not
looked at: what a model thinks of calling is not called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from astracli.config.recipe_env import ToolFormat
from astracli.errors import UserError
from astracli.models.chat import ChatFormat, has_template
from astracli.models.rendering import TooMuch, applied
from astracli.rewards.grading.extraction import without_thinking


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    written: bool = False
    """Whether all arguments came as text, whatever they are."""


@dataclass(frozen=True)
class Malformed:
    """What was meant as a call and is none."""

    reason: str


Found = Call | Malformed


class Format(Protocol):
    role: str
    """Of the turns that hold results."""
    opening: str
    """What stands before the first call of a turn."""

    def parse(self, text: str) -> list[Found]:
        """The calls of a turn, in its order."""
        ...


class Hermes:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5 and Qwen3, SmolLM3."""

    role, opening = "tool", "<tool_call>"

    def parse(self, text: str) -> list[Found]:
        return [
            _of_json(inner, ("arguments",)) if closed else Malformed("`<tool_call>` is not closed by `</tool_call>`")
            for inner, closed in _between(without_thinking(text), "<tool_call>", "</tool_call>")
        ]


class QwenXml:
    """`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`: Qwen3-Coder and Qwen3.5."""

    role, opening = "tool", "<tool_call>"
    _function = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
    _parameter = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def parse(self, text: str) -> list[Found]:
        return [
            self._call(inner) if closed else Malformed("`<tool_call>` is not closed by `</tool_call>`")
            for inner, closed in _between(without_thinking(text), "<tool_call>", "</tool_call>")
        ]

    def _call(self, inner: str) -> Found:
        function = self._function.fullmatch(inner)
        if function is None:
            return Malformed("a call is `<function=NAME>`, parameters, `</function>`")
        arguments: dict[str, str] = {}
        place, body = 0, function[2]
        while found := self._parameter.match(body, place):
            arguments[found[1].strip()] = found[2]
            place = found.end()
        if body[place:].strip():
            return Malformed("a parameter is `<parameter=KEY>`, its value, `</parameter>`")
        return Call(function[1].strip(), arguments, written=True)


class LlamaJson:
    """A turn that is nothing but `{"name": ..., "parameters": {...}}`, several separated by `;`: Llama 3."""

    role, opening = "tool", "{"
    _decoder = json.JSONDecoder()

    def parse(self, text: str) -> list[Found]:
        text = without_thinking(text)
        for name in ("<|python_tag|>", "<|eot_id|>", "<|eom_id|>"):
            text = text.replace(name, "")
        rest = text.strip()
        if not rest.startswith("{"):
            return []
        found: list[Found] = []
        while rest:
            try:
                document, end = self._decoder.raw_decode(rest)
            except (ValueError, RecursionError) as error:
                meant = found or re.match(r"""\{\s*["']name["']\s*:""", rest)
                return [*found, Malformed(f"the call is no JSON: {error}")] if meant else []
            if not found and not (isinstance(document, dict) and "name" in document):
                return []  # an answer that is JSON
            found.append(_of_document(document, ("parameters", "arguments")))
            rest = rest[end:].strip().removeprefix(";").strip()
        return found


class CodeBlocks:
    """Blocks of Python between lines of three backticks; the tool `python` runs each. Any model, without a template for
    tools. The output comes as the user's next turn."""

    role, opening = "user", "```"
    _block = re.compile(r"^[ \t]*```(?:python|py)[ \t]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)

    def parse(self, text: str) -> list[Found]:
        text = without_thinking(text)
        return [
            Call("python", {"code": block[1]})
            if block[0].rstrip().endswith("```") and block[0].count("```") > 1
            else Malformed("the block of Python is not closed by a line of three backticks")
            for block in self._block.finditer(text)
        ]


FORMATS: dict[ToolFormat, Format] = {
    "hermes": Hermes(),
    "qwen_xml": QwenXml(),
    "llama_json": LlamaJson(),
    "code": CodeBlocks(),
}


def of_template(tokenizer: Any, chat: ChatFormat) -> ToolFormat:
    """The format whose parser reads the calls that a chat template writes. Raises UserError when there is none."""
    call = Call("qvZtoolXwq", {"qvZkeyXwq": "qvZvalueXwq"})
    if has_template(tokenizer):
        asked: list[dict[str, Any]] = [{"role": "user", "content": "qvZquestionXwq"}]
        written = {"type": "function", "id": "qvZcalled", "function": {"name": call.name, "arguments": call.arguments}}
        turns = [*asked, {"role": "assistant", "content": "", "tool_calls": [written]}]
        for options in ({"enable_thinking": chat.thinking, **chat.template_args}, {}):
            try:
                start, whole = (
                    applied(tokenizer, some, add_generation_prompt=some is asked, **options) for some in (asked, turns)
                )
            except TooMuch:
                raise
            except Exception:  # it writes no calls
                continue
            turn = whole.removeprefix(start) if whole.startswith(start) else whole.partition("qvZquestionXwq")[2]
            for name, each in FORMATS.items():
                found = each.parse(turn)
                if [(one.name, dict(one.arguments)) for one in found if isinstance(one, Call)] == [
                    (call.name, dict(call.arguments))
                ]:
                    return name
    raise UserError(
        "env.format = auto: the model's chat template writes no calls of tools in a format that is known",
        f"say it yourself: env.format is one of {', '.join(FORMATS)}; describe the tools in data.system",
    )


def _between(text: str, opening: str, closing: str) -> list[tuple[str, bool]]:
    """(what stands behind each opening, whether it is closed)"""
    found = []
    for part in text.split(opening)[1:]:
        inner, closed, _ = part.partition(closing)
        found.append((inner, bool(closed)))
    return found


def _of_json(text: str, keys: tuple[str, ...]) -> Found:
    try:
        return _of_document(json.loads(text), keys)
    except (ValueError, RecursionError) as error:
        return Malformed(f"the call is no JSON: {error}")


def _of_document(document: Any, keys: tuple[str, ...]) -> Found:
    """`keys`: what may hold the arguments."""
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        return Malformed(f'a call is {{"name": ..., "{keys[0]}": {{...}}}}')
    arguments: Any = next((document[key] for key in keys if key in document), {})
    if isinstance(arguments, str):  # as some models write it: JSON inside of JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return Malformed(f"`{keys[0]}` is no JSON object")
    return Call(document["name"], arguments)
