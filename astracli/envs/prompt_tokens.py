"""The prompt of a problem in tokens: the chat turns of its row by the model's chat template."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from astracli.data.prompts import Problem
from astracli.models.chat import ChatFormat

KEPT = 1024


class PromptTokens:
    """`EnvSetup.prompt_tokens`. The last prompts are kept: a group needs its prompt more than once."""

    def __init__(self, tokenizer: Any, chat: ChatFormat):
        self._tokenizer, self._chat = tokenizer, chat
        self._kept: OrderedDict[int, tuple[Problem, np.ndarray]] = OrderedDict()

    def __call__(self, problem: Problem, tools: Sequence[Mapping[str, Any]] = ()) -> np.ndarray:
        """`tools`: JSON schemas; the same in every call."""
        key = id(problem)  # of an object that is kept here
        if key not in self._kept:
            tokens = self._chat.tokens(self._tokenizer, problem.messages, tools)
            self._kept[key] = problem, np.array(tokens, np.int32)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[key][1]

    @property
    def latest(self) -> list[int] | None:
        """Of the problem that came last; None: there was none."""
        kept = next(reversed(self._kept.values()), None)
        return None if kept is None else kept[1].tolist()
