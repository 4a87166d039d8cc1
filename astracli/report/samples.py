"""The samples of a report, packed by columns so that 20,000 of them stay small.

Texts are kept once, tokens as places in a list of token texts, log-probabilities as hundredths of a nat below zero.
What does not fit is left out evenly over the steps, and the page says how many of how many it shows.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from astracli.config import reading
from astracli.runs import documents, metrics
from astracli.runs.run_dir import RunDir

MOST = 20_000
"""Samples of a page at most."""
BUDGET_BYTES = 9_000_000
"""Compressed samples of a page at most; base64 makes a third more of them."""
HEAD_TOKENS, TAIL_TOKENS = 600, 200
"""What is kept of a long completion."""

Row = dict[str, Any]
Decode = Callable[[int], str]


def packed(run: RunDir, decode: Decode | None = None, *, most: int = MOST, budget: int = BUDGET_BYTES) -> str:
    """base64 of gzipped JSON, see `columns`. `decode` gives a token's text (None: `token_decoder(run)`)."""
    rows, total = chosen(run, most)
    decode = decode or token_decoder(run)
    while True:
        blob = gzip.compress(json.dumps(columns(rows, total, decode), separators=(",", ":")).encode(), 6, mtime=0)
        if len(blob) <= budget or len(rows) <= 1:
            return base64.b64encode(blob).decode()
        rows = spread(rows, max(1, int(len(rows) * 0.9 * budget / len(blob))))


def chosen(run: RunDir, most: int) -> tuple[list[Row], int]:
    """(rows, how many there are): rollout samples first, then those of the last and the first evaluation."""
    rollout = [row for file in sorted(run.samples.glob("*.jsonl")) for row in _rows(file)]
    total = len(rollout)
    by_step: dict[str, list[Path]] = {}
    for file in sorted((run.eval / "items").glob("step_*.jsonl")):
        by_step.setdefault(file.name[:11], []).append(file)
    steps = sorted(by_step)
    kept_steps = sorted({*steps[-1:], *steps[:1]})
    total += sum(_lines(file) for step in steps if step not in kept_steps for file in by_step[step])
    items = [row for step in kept_steps for file in by_step[step] for row in _rows(file)]
    total += len(items)
    room = max(most - len(items), most * 7 // 10)
    rollout = spread(rollout, min(room, most))
    return rollout + spread(items, most - len(rollout)), total


def spread(rows: list[Row], count: int) -> list[Row]:
    """`count` of the rows at even distances; all when there are no more."""
    if len(rows) <= count:
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _rows(file: Path) -> Iterator[Row]:
    """What a page needs of a file's samples: of a run of days all of their tokens would be gigabytes."""
    with reading.opened(file) as lines:
        for row in metrics.parse(lines):
            lists = {key: row.get(key) or [] for key in ("tokens", "logprobs")}
            row |= {key: list(_clipped(values)) for key, values in lists.items()}
            yield row | {"length": len(lists["tokens"])}


def _lines(file: Path) -> int:
    with reading.opened(file) as stream:
        return sum(1 for _ in stream)


def columns(rows: Sequence[Row], total: int, decode: Decode | None) -> dict[str, Any]:
    """{total, texts, vocabulary, and one list a column}; `cut[i]` tokens are missing before the last TAIL_TOKENS.

    Without a tokenizer the completions travel as text and their tokens as ids.
    """
    texts: dict[Any, int] = {}
    words: dict[int, int] = {}
    found: dict[str, Any] = {
        "total": total,
        "tail": TAIL_TOKENS,
        **{name: [row.get(name) for row in rows] for name in ("step", "version", "sample", "reward", "advantage")},
        "length": [row.get("length", len(row.get("tokens") or [])) for row in rows],
    }
    for column in ("benchmark", "problem_id", "problem", "answer", "verdict", "finish_reason"):
        found[column] = [_place(texts, row.get(column)) for row in rows]
    found["logged"] = [_place(texts, _logged(row)) for row in rows]
    found["completion"] = [_place(texts, row["completion"]) if decode is None else None for row in rows]
    found["tokens"] = [[_place(words, t) for t in _clipped(row.get("tokens") or [])] for row in rows]
    found["logprobs"] = [[_hundredths(p) for p in _clipped(row.get("logprobs") or [])] for row in rows]
    found["cut"] = [max(0, length - HEAD_TOKENS - TAIL_TOKENS) for length in found["length"]]
    found["texts"] = list(texts)
    found["vocabulary"] = [decode(token) if decode else f"{token} " for token in words]
    return found


def _logged(row: Row) -> str | None:
    """What a sample's reward logged, in a line a text; None where it logged nothing."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in (row.get("parts") or {}).items())
    lines = [parts, *(f"{name}: {text}" for name, text in (row.get("notes") or {}).items())]
    return "\n".join(filter(None, lines)) or None


def _hundredths(logprob: float | None) -> int | None:
    """None: a token that the policy did not draw."""
    return None if logprob is None else round(-100 * min(logprob, 0.0))


def _place(table: dict[Any, int], value: Any) -> int:
    """The place of a value in a table, which takes it when it is new."""
    return table.setdefault(value, len(table))


def _clipped(values: Sequence[Any]) -> Sequence[Any]:
    if len(values) <= HEAD_TOKENS + TAIL_TOKENS:
        return values
    return [*values[:HEAD_TOKENS], *values[-TAIL_TOKENS:]]


def token_decoder(run: RunDir) -> Decode | None:
    """The text of a token by the tokenizer.json of the run's export or model; None when neither is on this machine."""
    from tokenizers import Tokenizer

    file = next(
        (place / "tokenizer.json" for place in _model_places(run) if (place / "tokenizer.json").is_file()), None
    )
    if file is None:
        return None
    tokenizer = Tokenizer.from_file(str(file))

    def decode(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return text or tokenizer.id_to_token(token) or f"<{token}>"

    return decode


def _model_places(run: RunDir) -> Iterator[Path]:
    from astracli.data import fetch
    from astracli.errors import UserError

    yield run.export
    try:
        path = documents.document(run.recipe_json)["model"]["path"]
    except (KeyError, TypeError) as error:
        raise documents.damaged(run.recipe_json, f"it names no model ({error})") from None
    try:
        local = fetch.local_path(path)
    except UserError:
        return  # the model was a directory that is gone
    if local is not None:
        yield local
