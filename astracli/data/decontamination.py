"""Training problems that are also benchmark items: found by shared word n-grams, reported, and removable.

A problem is `equal` to an item when their words are the same, `near` when at least `NEAR` of the n-grams of the shorter
one stand in the other (n = 10 words, as in GPT-3's and later contamination reports). Texts shorter than n words have
one n-gram, themselves: for them near means equal.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from astracli.data.prompts import Problem

WORDS = 10
NEAR = 0.6
_WORD = re.compile(r"\\?[^\W_]+|[^\w\s]")
_IGNORED = frozenset("$.,;:!?\"'`{}()[]")


@dataclass(frozen=True)
class Overlap:
    """One training problem and the benchmark item that it shares most with."""

    row: int
    """Place of the problem in its set, from 0."""
    problem_id: str
    benchmark: str
    item_id: str
    kind: Literal["equal", "near"]
    share: float
    """Shared n-grams over those of the shorter text."""


def words(text: str) -> list[str]:
    """Lower-case words, commands, digits and operators; spacing, dollar signs, brackets and stops are no words."""
    return [word for word in _WORD.findall(text.casefold()) if word not in _IGNORED]


def grams(text: str, n: int = WORDS) -> frozenset[int]:
    """Hashes of the n-grams; of a shorter text one, of all its words. Empty for an empty text."""
    found = words(text)
    if not found:
        return frozenset()
    return frozenset(hash(tuple(found[i : i + n])) for i in range(max(1, len(found) - n + 1)))


def find(
    problems: Sequence[Problem], benchmarks: Mapping[str, Sequence[Problem]], *, n: int = WORDS, near: float = NEAR
) -> list[Overlap]:
    """The problems that are equal or near to an item, in their order, each with its closest item."""
    items: list[tuple[str, Problem, frozenset[int]]] = []
    holders: dict[int, list[int]] = defaultdict(list)
    for benchmark, members in benchmarks.items():
        for item in members:
            for gram in (own := grams(item.question, n)):
                holders[gram].append(len(items))
            items.append((benchmark, item, own))
    found = []
    for row, problem in enumerate(problems):
        mine = grams(problem.question, n)
        shared = Counter(place for gram in mine for place in holders.get(gram, ()))
        best = max(((count / min(len(mine), len(items[i][2])), -i) for i, count in shared.items()), default=(0.0, 0))
        if best[0] < near:
            continue
        benchmark, item, _ = items[-best[1]]
        equal = words(problem.question) == words(item.question)
        found.append(Overlap(row, problem.id, benchmark, item.id, "equal" if equal else "near", best[0]))
    return found


def summary(found: Sequence[Overlap], total: int) -> str:
    """`3 of 7,472 training problems are in a benchmark: math500 2 (1 equal), aime24 1 (0 equal)`"""
    by_name = Counter(overlap.benchmark for overlap in found)
    equal = Counter(overlap.benchmark for overlap in found if overlap.kind == "equal")
    parts = ", ".join(f"{name} {count} ({equal[name]} equal)" for name, count in by_name.most_common())
    return f"{len(found):,} of {total:,} training problems are in a benchmark" + (f": {parts}" if parts else "")


def write_without(source: Path, split: str, found: Sequence[Overlap], folder: Path, config: str | None = None) -> Path:
    """The set without the rows that overlap, as a .jsonl file in `folder`; the same rows give the same file name."""
    from astracli.data.rows import open_rows

    gone = {overlap.row for overlap in found}
    key = hashlib.sha256(
        json.dumps([str(source.resolve()), split, config, source.stat().st_mtime_ns, sorted(gone)]).encode()
    )
    target = folder / f"{source.stem}-decontaminated-{key.hexdigest()[:12]}.jsonl"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.tmp")
        with partial.open("w", encoding="utf-8") as out:
            for number, row in enumerate(open_rows(source, split, config)):
                if number not in gone:
                    kept = row if {"id", "unique_id"} & row.keys() else {"id": str(number), **row}
                    out.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")
        partial.replace(target)
    return target
