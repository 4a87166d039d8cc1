"""Problems in the order in which they are asked: a place in the sequence names its problem, and nothing else does.

There is no running state: an index alone says which source and epoch it falls into and which row it is, so a resumed
run, a second rollout worker and a repeated lease all get the same problem. The shuffle is a permutation of the whole
set, not of a window of it, and a problem is read from its file when its turn comes: 8 bytes a row stay in memory
besides the index.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config.recipe_data import GENERATED, sets, weights
from astracli.data.turns import PromptFormat, Turn

if TYPE_CHECKING:
    import numpy as np

    from astracli.config.recipe_data import DataTable

BLOCK = 1000
"""Prompts over which the sources of a mix have their shares: weights count to a thousandth."""


@dataclass(frozen=True)
class Problem:
    """One question with its answer."""

    id: str
    """Unique in its source, and in a mix."""
    question: str
    """Without the recipe's words around it; of a row of chat turns, the last user turn."""
    answer: str
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    messages: tuple[Turn, ...] = field(default=(), hash=False)
    """The turns that the chat template gets, with the recipe's system turn, examples and template."""
    row: dict[str, Any] = field(default_factory=dict, hash=False)
    """Every column of the source's row."""
    source: str = ""
    """Its source in a mix; "" where there is one."""


class PromptSource:
    """The training problems of a recipe: a new seeded order each epoch, endless, addressed by index.

    `paths` is what `datasets.fetch` returned, a path for each source by name; the path alone where there is one source.
    Raises UserError for bad data.
    """

    def __init__(self, data: DataTable, seed: int, paths: Mapping[str, str | Path | None] | str | Path | None = None):
        given = paths if isinstance(paths, Mapping) else {"": paths}
        self.parts = {name: _Part(name, table, seed, given.get(name)) for name, table in sets(data).items()}
        self._order = interleaved(weights(data))
        self._counts = {name: sum(part == name for part, _ in self._order) for name in self.parts}
        self.duplicates = sum(part.duplicates for part in self.parts.values())
        """Rows whose question occurred before."""

    def __len__(self) -> int:
        """Prompts until every problem was asked; the generated family never comes to an end (`sys.maxsize`)."""
        if len(self.parts) == 1:
            return next(len(part) for part in self.parts.values())
        blocks = max(-(-len(part) // self._counts[name]) for name, part in self.parts.items())
        return min(sys.maxsize, blocks * BLOCK)

    def problem(self, index: int) -> Problem:
        """The problem at place `index` >= 0 of the endless sequence."""
        part, place = self._place(index)
        return part.problem(place)

    def kind(self, index: int) -> str:
        """What the solve rate of the problem at place `index` is counted under: its level, or the problem itself."""
        part, place = self._place(index)
        problem = part.problem(place)
        return str(problem.meta["level"]) if part.rows is None else problem.id

    def _place(self, index: int) -> tuple[_Part, int]:
        """(source, place in its own endless sequence)"""
        block, rest = divmod(index, len(self._order))
        name, place = self._order[rest]
        return self.parts[name], block * self._counts[name] + place


class _Part:
    """One source."""

    def __init__(self, name: str, data: DataTable, seed: int, path: str | Path | None):
        self.name = name
        self._seed = seed
        self._levels = list(data.levels)
        self._format = PromptFormat.of(data)
        self.rows: Sequence[Problem] | None = None
        self.duplicates = 0
        self._order = lru_cache(maxsize=2)(_order)
        if data.source == GENERATED:
            return
        from astracli.data import datasets

        self.rows = loaded = datasets.load(data, path)
        self.duplicates = loaded.duplicates

    def __len__(self) -> int:
        return sys.maxsize if self.rows is None else len(self.rows)

    def problem(self, index: int) -> Problem:
        if self.rows is None:
            from astracli.data import arithmetic

            drawn = arithmetic.draw(index, self._seed, self._levels)
            problem = replace(drawn, messages=self._format.messages(drawn.question, {}))
        else:
            epoch, place = divmod(index, len(self.rows))
            problem = self.rows[int(self._order(len(self.rows), self._seed, epoch)[place])]
        return replace(problem, id=f"{self.name}/{problem.id}", source=self.name) if self.name else problem


def interleaved(shares: Mapping[str, float]) -> list[tuple[str, int]]:
    """The sources of a block of prompts in their order, each with its place among those of its source: evenly spread.

    A share is rounded to a thousandth, and is one prompt at least. One source makes a block of one.
    """
    if len(shares) == 1:
        return [(next(iter(shares)), 0)]
    total = sum(shares.values())
    exact = {name: share / total * BLOCK for name, share in shares.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for i in range(max(0, BLOCK - sum(counts.values()))):
        counts[by_rest[i % len(by_rest)]] += 1
    while sum(counts.values()) > BLOCK:
        counts[max(counts, key=lambda name: counts[name])] -= 1
    places = [((i + 0.5) / count, name, i) for name, count in counts.items() for i in range(count)]
    rank = {name: number for number, name in enumerate(shares)}
    return [(name, i) for _, name, i in sorted(places, key=lambda place: (place[0], rank[place[1]]))]


def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [rows], a permutation: rows sorted by a hash of (seed, epoch, row), the same on every machine."""
    import numpy as np
    import xxhash

    keys = (xxhash.xxh64_intdigest(struct.pack("<QQQ", seed, epoch, row)) for row in range(rows))
    return np.argsort(np.fromiter(keys, np.uint64, rows), kind="stable")


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
