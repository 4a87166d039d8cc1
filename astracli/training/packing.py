"""Micro-batches under a token budget: one packed row each on a GPU, right-padded rows on a CPU. Decided here alone.

A packed row holds whole samples one after the other, without padding; `bounds_S1` says where each begins, positions
restart there, and nothing may cross it (`varlen.py`; the start-up check proves it). On a CPU padding is cheaper than
many short segments.

Shape letters: S segments of a packed row, T its tokens, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from astracli.adapter import ModelAdapter
from astracli.errors import UserError
from astracli.recipe import Recipe
from astracli.rl import batch
from astracli.rl.batch import MicroBatch, Row

ATTENTION = ("auto", "sdpa")
"""Values of train.attention under which a packed row gets its own attention function."""


def choose(recipe: Recipe, adapter: ModelAdapter, device: str) -> tuple[str, str]:
    """(`packed` or `padded`, the reason). Raises UserError when a recipe asks for packed rows that would leak."""
    asked, attention = recipe.train.packing, recipe.train.attention
    obstacle = None
    if adapter.hybrid and adapter.install_varlen is None:
        obstacle = f"adapter `{adapter.name}` cannot reset its recurrent state inside a row (install_varlen)"
    elif attention not in ATTENTION:
        obstacle = f"train.attention = {attention} does not know the boundaries of a packed row"
    if asked == "packed" and obstacle is not None:
        raise UserError(f"train.packing = packed: {obstacle}", "use `--set train.packing=padded`")
    if asked != "auto":
        return asked, "the recipe asks for it"
    if device == "cpu":
        return "padded", "right-padded rows are quicker than short segments on a CPU"
    return ("padded", obstacle) if obstacle is not None else ("packed", "one row a micro-batch, nothing is padded")


def micro_batches(rows: Sequence[Row], tokens_per_microbatch: int, pad_token: int) -> list[MicroBatch]:
    """Packed rows of at most the budget: longest sample first, each into the fullest row that has room for it.

    A sample over the budget travels alone. The same rows give the same division.
    """
    bins: list[list[Row]] = []
    load: list[int] = []
    for row in sorted(rows, key=lambda r: (-len(r), r.index)):
        room = [i for i, used in enumerate(load) if used + len(row) <= tokens_per_microbatch]
        if room:
            fullest = max(room, key=lambda i: (load[i], -i))
            bins[fullest].append(row)
            load[fullest] += len(row)
        else:
            bins.append([row])
            load.append(len(row))
    return [pack_rows(sorted(found, key=lambda r: r.index)) for found in bins]


def pack_rows(rows: list[Row], pad_token: int = 0) -> MicroBatch:
    """One row of shape [1, T]. The token at column i is predicted by the hidden state at column i - 1."""
    bounds_S1 = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tokens_1T = np.concatenate([row.tokens for row in rows]).astype(np.int64)[None]
    predict = [
        np.arange(row.prompt_length - 1, len(row) - 1, dtype=np.int64) + start
        for row, start in zip(rows, bounds_S1[:-1], strict=True)
    ]
    return batch.micro_batch(rows, tokens_1T, np.ones_like(tokens_1T), np.concatenate(predict), bounds_S1)


def positions(bounds_S1: np.ndarray) -> np.ndarray:
    """int64 [T]: 0, 1, ... from every boundary on."""
    lengths_S = np.diff(bounds_S1)
    return np.arange(bounds_S1[-1], dtype=np.int64) - np.repeat(bounds_S1[:-1], lengths_S)


def dividers(packed: bool) -> tuple[batch.Divide, batch.Join]:
    """How rows are divided into micro-batches, and how given rows are joined into one."""
    return (micro_batches, pack_rows) if packed else (batch.micro_batches, batch.pad_rows)
