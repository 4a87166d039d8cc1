"""Stop strings: a completion ends with the token that completes one of some texts.

The rule is one for all engines and stands here, on tokens: `cut` says where a completion ends. An engine that knows it
stops there by itself; of one that does not, the client cuts what came back. The tokens before the cut are those that
were drawn, with their log-probabilities, so both ways train alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astracli.engines.contract import GenResult

BYTES_A_LETTER = 4
"""A tokenizer of bytes may spend so many tokens on one letter."""
MORE = 8
"""Tokens looked at besides: special ones say nothing."""


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion, and the tokenizer by which tokens are read."""

    texts: tuple[str, ...]
    tokenizer: Any = field(repr=False, compare=False)

    @cached_property
    def window(self) -> int:
        """Latest tokens in which a text that has just been completed lies."""
        return BYTES_A_LETTER * max(map(len, self.texts)) + MORE

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last token of a completion completes one of the texts, when none was complete before."""
        return self._holds(tokens[-self.window :])

    def cut(self, tokens: Sequence[int]) -> int | None:
        """How many tokens the completion has, up to the one that completes the first of the texts; None: it goes on."""
        if not self._holds(tokens):
            return None
        short, enough = 0, len(tokens)  # texts that are complete stay so: the shortest beginning that holds one
        while enough - short > 1:
            middle = (short + enough) // 2
            short, enough = (short, middle) if self._holds(tokens[:middle]) else (middle, enough)
        return enough

    def _holds(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)
        return any(stop in text for stop in self.texts)

    def ended(self, before: Sequence[int], result: GenResult) -> GenResult:
        """A result that ends where the texts say. `before`: tokens of the same completion from earlier requests."""
        length = self.cut([*before, *result.tokens])
        if length is None:
            return result
        kept = max(0, length - len(before))
        return replace(result, tokens=result.tokens[:kept], logprobs=result.logprobs[:kept], finish_reason="stop")
