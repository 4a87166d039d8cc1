"""Examples of supervised training: from a problem's row to token ids, and which of them are trained.

Token in, token out, as in rollouts: the prompt is made as a rollout makes it, an answer is tokenised by itself, and
between two turns stands what the chat template puts there (`models.conversation`). So a model that was trained on
examples is asked in the same tokens afterwards. An assistant turn is trained with the token that ends it: the first one
that the template writes behind the turn if that is a special token, else the tokenizer's end of sequence. Without it a
model would not learn to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from astracli.config.recipe_data import sets
from astracli.data.problems import TURNS_FIELD
from astracli.data.turns import Turn, lookup, turns_of
from astracli.data.values import as_text
from astracli.errors import UserError
from astracli.models.chat import ChatFormat
from astracli.models.conversation import Conversation

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.config.recipe_sft import SftTable
    from astracli.data.prompts import Problem


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    """Token ids up to where the first trained answer begins."""
    parts: list[tuple[list[int], bool]]
    """What follows, in pieces: (token ids, whether they are trained). The last piece is trained."""

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(ids) for ids, _ in self.parts)


def answer_of(problem: Problem, sft: SftTable, question_field: str) -> str:
    """What the model should answer to `problem.messages`. Raises UserError when the row does not say it."""
    row = problem.row
    if not row:  # generated
        from astracli.data import arithmetic

        try:
            return arithmetic.worked_text(problem.question)
        except ValueError:
            raise UserError(
                f"`{problem.question}` has no worked solution to train on", "leave mul2 and mul3 out of data.levels"
            ) from None
    try:
        held = lookup(row, sft.completion_field)
    except KeyError:
        held = None
    if isinstance(held, list) and (turns := turns_of(held)) and len(turns) == 1:
        held = turns[0]["content"]  # as conversational data sets of prompts and completions have it
    if isinstance(held, str | int | float) and not isinstance(held, bool) and as_text(held).strip():
        return as_text(held)
    if held is not None:
        raise _no_answer(problem, f"`{sft.completion_field}` is empty, or no text")
    found = _turns(row, question_field)
    if not found or found[-1]["role"] != "assistant" or not str(found[-1]["content"]).strip():
        raise _no_answer(problem, f"there is no column `{sft.completion_field}`, and no chat turns that end with one")
    return str(found[-1]["content"])


def _no_answer(problem: Problem, why: str) -> UserError:
    return UserError(
        f"row `{problem.id}` of the examples has no answer of the assistant: {why}; its fields: "
        + ", ".join(f"`{key}`" for key in problem.row),
        "name the column of the answers with sft.completion_field",
    )


def _turns(row: Mapping[str, Any], question_field: str) -> list[Turn]:
    """The row's own chat turns; [] when its prompt is a text."""
    for name in (question_field, TURNS_FIELD):
        try:
            held = lookup(row, name)
        except KeyError:
            continue
        return turns_of(held) or []
    return []


class ExampleTokens:
    """Problems as examples, for one recipe and tokenizer."""

    def __init__(self, recipe: Recipe, tokenizer: Any):
        assert recipe.sft is not None
        self._sft = recipe.sft
        self._question_fields = {name: table.question_field for name, table in sets(recipe.data).items()}
        self._tokenizer, self._chat = tokenizer, ChatFormat.of(recipe)
        self._conversation = Conversation(tokenizer, self._chat)
        self._special = set(getattr(tokenizer, "all_special_ids", None) or ())
        self._renders_in_parts: set[str] = set()

    def __call__(self, problem: Problem) -> Example:
        """Raises UserError: no answer, or a template that cannot be rendered in parts."""
        question_field = self._question_fields[problem.source]
        answer = answer_of(problem, self._sft, question_field)
        messages = list(problem.messages)
        own = _turns(problem.row, question_field) if self._sft.loss_on == "all" else []
        # of the row's own turns the first may be a system turn, which stands before the recipe's examples, and the last
        # is left out if it is the assistant's
        count = sum(turn["role"] != "system" for turn in own[:1]) + len(own[1:])
        count -= len(own) > 1 and own[-1]["role"] == "assistant"
        places = [i for i in range(len(messages) - count, len(messages)) if messages[i]["role"] == "assistant"]
        turns = [*messages, {"role": "assistant", "content": answer}]
        places.append(len(messages))
        prompt = self._conversation.prompt(turns[: places[0]])
        parts: list[tuple[list[int], bool]] = []
        for place, following in zip(places, [*places[1:], None], strict=True):
            parts.append(([*self._text(turns[place]), self.end], True))
            if following is not None:
                new = turns[place + 1 : following]
                self._require_parts(new)
                parts.append((self._conversation.after([self.end], new), False))
        return Example(prompt, [part for part in parts if part[0]])

    def _text(self, turn: Mapping[str, Any]) -> list[int]:
        """Token ids of what the assistant says in a turn."""
        (hidden,), back = self._chat.hidden(self._tokenizer, [turn])
        return self._chat.encoded(self._tokenizer, str(hidden["content"]), back)

    def _require_parts(self, new: Sequence[Mapping[str, Any]]) -> None:
        for role in {str(turn["role"]) for turn in new} - self._renders_in_parts:
            try:
                self._conversation.check(role)
            except UserError as error:
                raise UserError(
                    error.message, "train the last assistant turn alone: `--set sft.loss_on=last`"
                ) from None
            self._renders_in_parts.add(role)

    @cached_property
    def end(self) -> int:
        """The token that ends an assistant turn."""
        behind = self._conversation.after([], [])
        return int(behind[0] if behind and behind[0] in self._special else self._tokenizer.eos_token_id)

    @cached_property
    def writable(self) -> list[int]:
        """Tokens that a text can hold, and the end token: what smoothed labels are drawn from."""
        added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
        special = self._special | {place for place, token in added.items() if token.special}
        return sorted({place for place in range(len(self._tokenizer)) if place not in special} | {self.end})
