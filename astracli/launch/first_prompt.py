"""The first training prompt, or example, as the model gets it, for `--dry-run` and `astra doctor RECIPE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from astracli.config import recipe_data
from astracli.data.prompts import PromptSource
from astracli.data.turns import PromptFormat
from astracli.errors import UserError
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.data.examples import Example
    from astracli.data.prompts import Problem

SHOWN = 1600
"""Characters of a prompt, or of a piece of an example, that are shown; what is longer loses its middle."""


@dataclass(frozen=True)
class FirstPrompt:
    KEY: ClassVar[str] = "first_prompt"
    """Its name in a JSON document."""
    source: str
    """Name in `[[data.mix]]`; "" of a single source."""
    text: str
    """Special tokens by their names, up to where the answer begins."""
    tokens: int
    unknown: int
    """Tokens that stand for text which the vocabulary does not have."""

    def document(self) -> dict[str, Any]:
        return vars(self).copy()

    def title(self) -> str:
        source = f" of `{self.source}`" if self.source else ""
        unknown = f", {self.unknown:,} of them not in its vocabulary" if self.unknown else ""
        return f"first training prompt{source}, as the model gets it ({self.tokens:,} tokens{unknown})"

    def shown(self) -> str:
        """The text, without its middle where it is long."""
        return _shortened(self.text)


@dataclass(frozen=True)
class Piece:
    text: str
    """Special tokens by their names."""
    tokens: int
    trained: bool


@dataclass(frozen=True)
class FirstExample:
    KEY: ClassVar[str] = "first_example"
    source: str
    """Name in `[[data.mix]]`; "" of a single source."""
    pieces: list[Piece]
    """The whole example in order."""
    unknown: int
    """Tokens that stand for text which the vocabulary does not have."""

    def document(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tokens": sum(piece.tokens for piece in self.pieces),
            "trained": sum(piece.tokens for piece in self.pieces if piece.trained),
            "unknown": self.unknown,
            "pieces": [vars(piece).copy() for piece in self.pieces],
        }

    def title(self) -> str:
        source, told = f" of `{self.source}`" if self.source else "", self.document()
        unknown = f", {self.unknown:,} of them not in its vocabulary" if self.unknown else ""
        return (
            f"first training example{source}, as the model gets it ({told['tokens']:,} tokens{unknown}; "
            f"{told['trained']:,} are trained)"
        )

    def shown(self) -> str:
        """Each piece under a line that says whether it is trained."""
        return "\n".join(
            f"[{'trained' if piece.trained else 'not trained'}, {piece.tokens:,} tokens]\n{_shortened(piece.text)}"
            for piece in self.pieces
        )


def _shortened(text: str) -> str:
    left = len(text) - SHOWN
    if left <= 0:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[... {left:,} characters left out ...]\n{text[-half:]}"


def of_example(example: Example, source: str, tokenizer: Any) -> FirstExample:
    """An example of the source of that name, for people to read."""
    parts = [(ids, trained) for ids, trained in [(example.prompt, False), *example.parts] if ids]
    pieces = [Piece(str(tokenizer.decode(ids)), len(ids), trained) for ids, trained in parts]
    odd = tokenizer.unk_token_id
    return FirstExample(source, pieces, 0 if odd is None else sum(ids.count(odd) for ids, _ in parts))


def find(recipe: Recipe, folder: Path, first: Mapping[str, Problem], drawn: Sequence[int] | None) -> FirstPrompt:
    """The prompt of the first row of the first source. `first`: those of the sources that are read from files; `drawn`:
    the tokens that the run's environment asks with, where it is not the single turn. Raises UserError."""
    tokenizer, source = load_tokenizer(folder), next(iter(recipe_data.sets(recipe.data)))
    ids = tokens(recipe, folder, first_turns(recipe, first)) if drawn is None else list(drawn)
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    return FirstPrompt(source, str(tokenizer.decode(ids)), len(ids), unknown)


def first_turns(recipe: Recipe, first: Mapping[str, Problem]) -> Sequence[Mapping[str, Any]]:
    """The turns of the first row of the first source. Of rows that are not on this machine, a question as the recipe
    words it."""
    name, table = next(iter(recipe_data.sets(recipe.data).items()))
    if name in first:
        return first[name].messages
    if table.source == recipe_data.GENERATED:
        return PromptSource(table, recipe.seed).problem(0).messages
    return PromptFormat.of(table).messages("1+1", {})


def tokens(recipe: Recipe, folder: Path, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of chat turns by the chat template of the checkpoint in `folder`. Raises UserError when the template
    does not take them."""
    try:
        return ChatFormat.of(recipe).tokens(load_tokenizer(folder), messages)
    except UserError:
        raise
    except Exception as error:  # whatever the template raises
        roles = ", ".join(str(turn["role"]) for turn in messages)
        raise UserError(
            f"the chat template of `{recipe.model.path}` does not take these turns ({roles}): {error}",
            "see data.system, data.few_shot and model.template_args, and which roles the column of turns has",
        ) from None
