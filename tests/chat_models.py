"""A small byte-level tokenizer with the templates of tests/fixtures/templates, and a policy that says its lines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, EnvSetup, TokenIds, Turn
from astracli.envs.prompt_tokens import PromptTokens
from astracli.models.chat import ChatFormat

TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
ENDS = {"llama3": "<|eot_id|>", "tools_last": "</s>"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<s>", "</s>"]
TEXT = [
    "assistant user system tool ipython",
    "<tool_call> <think> </think> calculator expression 12 + 34",
    " the  answer",
]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """With the template of a name, or that of a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    file = TEMPLATES / f"{name[:40]}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=ENDS.get(name, "<|im_end|>"),
        additional_special_tokens=SPECIAL,
        chat_template=file.read_text() if file.exists() else name,
        clean_up_tokenization_spaces=False,
    )


def made(kind: type[Env], recipe: Any, name: str, grader: Any = None) -> Env:
    """An Env of a kind with the template of a name."""
    coder = tokenizer(name)
    return kind(EnvSetup(recipe, coder, lambda problem: grader, PromptTokens(coder, ChatFormat.of(recipe))))


def asked(question: str, answer: str = "", **row: Any) -> Problem:
    return Problem(question, question, answer, messages=({"role": "user", "content": question},), row=row)


class Lines:
    """A policy that says what it is given, one text a turn, each token with a log-probability of its own."""

    def __init__(self, coder: Any, lines: Sequence[str], *, room: int = 10_000, version: int = 3):
        self._coder, self._lines, self._room, self._version = coder, list(lines), room, version
        self.drawn: list[tuple[list[int], Turn]] = []
        """Each turn with the tokens that it follows."""

    async def generate(self, tokens: TokenIds, stop: Sequence[int] = (), budget: int | None = None) -> Turn:
        context = [int(token) for token in tokens]
        room = min(self._room - len(context), 10_000 if budget is None else budget)
        ids = self._coder(self._lines[len(self.drawn)], add_special_tokens=False)["input_ids"]
        cut = ids[: max(0, room)]
        first = sum(len(turn.tokens) for _, turn in self.drawn)
        logprobs = -np.arange(first, first + len(cut), dtype=np.float32) / 1000
        versions = np.full(len(cut), self._version + len(self.drawn), np.int32)
        turn = Turn(np.array(cut, np.int32), logprobs, versions, "stop" if len(cut) == len(ids) else "length")
        self.drawn.append((context, turn))
        return turn
