"""Problems in the order in which they are asked: a place in the sequence names its problem, and nothing else does.

There is no running state: an index alone says which epoch it falls into and which row it is, so a resumed run, a second
rollout worker and a repeated lease all get the same problem. The shuffle is a permutation of the whole set, not of a
window of it, and a problem is read from its file when its turn comes: 8 bytes a row stay in memory besides the index.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from astracli.config.recipe import DataTable


@dataclass(frozen=True)
class Problem:
    """One question with its answer."""

    id: str
    """Unique in its source."""
    question: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    messages: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    """The turns that the model is asked with; empty: one user turn."""
    row: dict[str, Any] = field(default_factory=dict, hash=False)
    """Every column of the row that it was read from."""


class PromptSource:
    """The training problems of a recipe: a new seeded order each epoch, endless, addressed by index.

    `local_path` is what `datasets.fetch` returned (None for the generated family). Raises UserError for bad data.
    """

    def __init__(self, data: DataTable, seed: int, local_path: str | Path | None = None):
        self._seed = seed
        self._levels = list(data.levels)
        self._template = data.prompt
        self._rows: Sequence[Problem] | None = None
        self.duplicates = 0
        """Rows whose question occurred before."""
        if data.source == "arithmetic":
            return
        from astracli.data import datasets

        self._rows = loaded = datasets.load(data, local_path)
        self.duplicates = loaded.duplicates

    def __len__(self) -> int:
        """Problems in one epoch; the generated family never comes to an end (`sys.maxsize`)."""
        return sys.maxsize if self._rows is None else len(self._rows)

    def problem(self, index: int) -> Problem:
        """The problem at place `index` >= 0 of the endless sequence."""
        if self._rows is None:
            from astracli.data import arithmetic

            return arithmetic.draw(index, self._seed, self._levels)
        epoch, place = divmod(index, len(self._rows))
        return self._rows[int(_order(len(self._rows), self._seed, epoch)[place])]

    def kind(self, index: int) -> str:
        """What the solve rate of the problem at place `index` is counted under: its level, or the problem itself."""
        problem = self.problem(index)
        return str(problem.meta["level"]) if self._rows is None else problem.id

    def text(self, problem: Problem) -> str:
        """What the user turn says for a problem."""
        return render(self._template, problem.question)


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [rows], a permutation: rows sorted by a hash of (seed, epoch, row), the same on every machine."""
    import numpy as np
    import xxhash

    keys = (xxhash.xxh64_intdigest(struct.pack("<QQQ", seed, epoch, row)) for row in range(rows))
    return np.argsort(np.fromiter(keys, np.uint64, rows), kind="stable")


def render(template: str, question: str) -> str:
    """Put a question into a prompt. Plain replacement: `\\boxed{}` and braces in the question stay as they are."""
    return template.replace("{question}", question)


def stop_token_ids(tokenizer: Any, model_path: str | Path) -> list[int]:
    """Token ids that end a completion: the tokenizer's end of sequence and those of generation_config.json."""
    import json

    found = {tokenizer.eos_token_id}
    try:
        declared = json.loads((Path(model_path) / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        declared = None
    found |= set(declared) if isinstance(declared, list) else {declared}
    return sorted(int(token) for token in found if token is not None)
