"""Is one evaluation better than another? A sign-flip test over paired items, from the two item files.

Items are matched by id, so that the difficulty of an item falls out of the difference. Were both evaluations equally
good, an item's difference would be as likely to have the other sign: p is the share of sign choices whose mean
difference is at least as far from 0 as the one seen. All 2^n choices are gone through for up to `EXACT` items, `DRAWS`
random ones (seeded) for more, with p = (1 + as far) / (1 + draws). A difference is real where p is at most `LEVEL`,
which then happens to equals in at most that share of comparisons. The interval holds the differences that the same test
does not reject. With fewer than `LEAST` items even differences of one sign have p > `LEVEL`: nothing can be said.

`overall` is the unweighted mean over benchmarks; signs are those of all their items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from astracli.errors import UserError
from astracli.runs import documents

DRAWS = 10_000
EXACT = 14
"""Items up to which all signs are gone through: 16,384 choices."""
LEVEL = 0.05
LEAST = 6
"""2 / 2^6 = 0.031 is the first p that is at most LEVEL."""
_TIE = 1e-12
"""Differences are multiples of 1 / samples; sums of them in another order are off by less."""
Shares = dict[str, dict[str, float]]
"""{benchmark: {item id: share of right samples}}"""


@dataclass(frozen=True)
class Difference:
    """B minus A on one benchmark; fractions."""

    benchmark: str
    items: int
    a: float
    b: float
    difference: float
    low: float
    """Lower end of the 95 % interval of `difference`; -inf where too few items bound it."""
    high: float
    p: float
    differing: int
    """Items whose shares are not equal."""

    @property
    def real(self) -> bool:
        return self.p <= LEVEL

    @property
    def verdict(self) -> str:
        """`real`, `not shown` or `too few items`"""
        return "real" if self.real else "too few items" if self.items < LEAST else "not shown"


def read_shares(text: str) -> Shares:
    """The items of an evaluation: a run, an evaluation of it, or `RUN@STEP`; without a step the newest. UserError."""
    name, at, step = text.rpartition("@")
    if not at or not step.isdigit():
        name, step = text, ""
    places = [Path(name), Path("runs", name)]
    folder = next((p for place in places for p in (place / "eval/items", place / "items") if p.is_dir()), None)
    if folder is None:
        there = any(place.is_dir() for place in places)
        raise UserError(
            f"`{name}` holds no evaluation: " + ("no `eval/items` in it" if there else "there is no such directory"),
            "give the directory of a run or of an `astra eval`; RUN@STEP takes one step of a training run",
        )
    files: dict[int, list[Path]] = defaultdict(list)
    for file in sorted(folder.glob("step_*.jsonl")):
        files[int(file.name.split("_")[1])].append(file)
    if step and int(step) not in files:
        raise UserError(f"`{name}` has no evaluation of step {step}: {', '.join(map(str, sorted(files))) or 'none'}")
    if not files:
        raise UserError(f"`{folder}` is empty", "the evaluation has not ended")
    return {bench: shares for file in files[int(step) if step else max(files)] for bench, shares in _shares(file)}


def _shares(file: Path) -> list[tuple[str, dict[str, float]]]:
    right: dict[str, list[bool]] = defaultdict(list)
    benchmark = ""
    for row in documents.lines(file, "benchmark", "problem_id", "verdict"):
        benchmark = row["benchmark"]
        right[row["problem_id"]].append(row["verdict"] == "right")
    return [(benchmark, {item: sum(each) / len(each) for item, each in right.items()})] if right else []


def compare(a: Shares, b: Shares, *, seed: int = 0, draws: int = DRAWS) -> list[Difference]:
    """One row a benchmark that both have, and `overall` when there are several. Raises UserError for other items."""
    common = [name for name in a if name in b]
    if not common:
        raise UserError(f"no benchmark in common: {', '.join(a)} and {', '.join(b)}")
    rows, differences, means = [], [], []
    for place, name in enumerate(common):
        if a[name].keys() != b[name].keys():
            both = len(a[name].keys() & b[name].keys())
            raise UserError(
                f"`{name}` has {len(a[name])} items in one evaluation and {len(b[name])} in the other, "
                f"{both} in common",
                "evaluate both on the same benchmark file",
            )
        pairs = np.array([(a[name][item], b[name][item]) for item in sorted(a[name])])
        means.append(tuple(float(x) for x in pairs.mean(axis=0)))
        differences.append(pairs[:, 1] - pairs[:, 0])
        rows.append(_row(name, means[-1], differences[-1:], np.random.default_rng([seed, place]), draws))
    if len(rows) > 1:
        rng = np.random.default_rng([seed, len(common)])
        rows.append(_row("overall", tuple(float(x) for x in np.mean(means, axis=0)), differences, rng, draws))
    return rows


def _row(
    name: str, means: tuple[float, ...], differences: list[np.ndarray], rng: np.random.Generator, draws: int
) -> Difference:
    """The test of the mean over benchmarks of their items' mean difference."""
    every = np.concatenate(differences)
    weights = np.concatenate([np.full(len(each), 1 / len(each) / len(differences)) for each in differences])
    seen = float(weights @ every)
    flipped, shift = _flipped(np.stack([weights * every, weights], axis=1), rng, draws)
    drawn = int(len(every) > EXACT)  # the signs as they are count among random ones
    p = (drawn + int((np.abs(flipped) >= abs(seen) - _TIE).sum())) / (drawn + len(flipped))
    below, above = (_reach(flipped - seen * shift, sign * shift, drawn) for sign in (-1, 1))
    a, b = means
    return Difference(
        name,
        len(every),
        a,
        b,
        seen,
        round(seen - below, 12),  # a tie with 0 is 0
        round(seen + above, 12),
        p,
        int((np.abs(every) > _TIE).sum()),
    )


def _flipped(columns: np.ndarray, rng: np.random.Generator, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the two columns [items, 2] under each choice of signs; in blocks, so that memory stays under 50 MB."""
    items = len(columns)
    if items <= EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**items)[:, None] >> np.arange(items)) & 1)
        return tuple((signs @ columns).T)
    block = max(1, 2_000_000 // items)
    sums = [
        (1.0 - 2.0 * rng.integers(0, 2, (min(block, draws - done), items), dtype=np.int8)) @ columns
        for done in range(0, draws, block)
    ]
    return tuple(np.concatenate(sums).T)


def _reach(apart: np.ndarray, shift: np.ndarray, drawn: int) -> float:
    """How far the true difference may lie from the one seen without being rejected; inf: however far.

    At a distance e a choice of signs is as far out as what was seen where |apart - e shift| >= e; |shift| <= 1, so that
    holds up to one e for each choice. The largest e that more than `LEVEL` of the choices reach is the answer.
    """
    limits = np.zeros(len(apart))
    above, below = apart > _TIE, apart < -_TIE
    limits[above] = apart[above] / (1.0 + shift[above])
    limits[below] = -apart[below] / (1.0 - shift[below])
    limits[~above & ~below & (np.abs(shift) > 1.0 - _TIE)] = np.inf
    count = math.floor(LEVEL * (len(limits) + drawn) + _TIE) + 1 - drawn
    return float(np.sort(limits)[-max(1, count)])


@dataclass(frozen=True)
class Against:
    """One evaluation of several beside the first of them, on one benchmark."""

    run: str
    difference: Difference
    p_holm: float
    """p, corrected for as many comparisons as the benchmark has (Holm 1979): at most LEVEL is real."""

    @property
    def verdict(self) -> str:
        """As `Difference.verdict`, by the corrected p."""
        real = self.p_holm <= LEVEL
        return "real" if real else "too few items" if self.difference.items < LEAST else "not shown"


def several(evaluations: Mapping[str, Shares]) -> list[Against]:
    """Each evaluation behind the first compared with it, benchmark by benchmark. Raises UserError for other items."""
    (_, first), *others = evaluations.items()
    rows = [(name, row) for name, shares in others for row in compare(first, shares)]
    corrected: dict[tuple[str, str], float] = {}
    for benchmark in dict.fromkeys(row.benchmark for _, row in rows):
        of_it = {name: row.p for name, row in rows if row.benchmark == benchmark}
        corrected |= {(name, benchmark): p for name, p in zip(of_it, holm(list(of_it.values())), strict=True)}
    return [Against(name, row, corrected[name, row.benchmark]) for name, row in rows]


def holm(ps: Sequence[float]) -> list[float]:
    """Each p corrected for the number of tests, in the given order: the i-th smallest of n times n - i, never below a
    smaller one's, at most 1."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


def words(row: Difference) -> str:
    """`B is better: +0.237, 95 % interval +0.210 to +0.260`"""
    if row.verdict == "too few items":
        return f"too few items: {row.difference:+.3f} over {row.items}, at least {LEAST} must differ to tell"
    interval = f", 95 % interval {row.low:+.3f} to {row.high:+.3f}"
    if row.real:
        return f"{'B' if row.difference > 0 else 'A'} is better: {row.difference:+.3f}{interval}"
    few = f"; {row.differing} of {row.items} items differ" if row.differing < LEAST else ""
    return f"no real difference: {row.difference:+.3f}{interval}{few}"


def document(a: str, b: str, rows: list[Difference]) -> Mapping[str, object]:
    """As JSON, in which what is not bounded is null."""
    ends = [{k: v if math.isfinite(v) else None for k, v in (("low", r.low), ("high", r.high))} for r in rows]
    lines = [vars(r) | its | {"real": r.real, "verdict": r.verdict} for r, its in zip(rows, ends, strict=True)]
    return {"a": a, "b": b, "draws": DRAWS, "benchmarks": lines}
