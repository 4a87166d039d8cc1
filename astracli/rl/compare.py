"""Is one evaluation better than another? A paired bootstrap over items, from the two item files.

Items are matched by id, so that the difficulty of an item falls out of the difference. For every benchmark the items
are drawn again with replacement `DRAWS` times (seeded): the middle 95 % of the mean differences is the interval, and
the difference is called real when 0 is outside. p is two-sided, (1 + draws on the other side of 0) x 2 / (DRAWS + 1).
`overall` is the unweighted mean over benchmarks, each drawn for itself.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from astracli.errors import UserError

DRAWS = 10_000
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
    """Lower end of the 95 % interval of `difference`."""
    high: float
    p: float
    real: bool
    """Whether 0 is outside the interval."""


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
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            benchmark = row["benchmark"]
            right[row["problem_id"]].append(row["verdict"] == "right")
    return [(benchmark, {item: sum(each) / len(each) for item, each in right.items()})] if right else []


def compare(a: Shares, b: Shares, *, seed: int = 0, draws: int = DRAWS) -> list[Difference]:
    """One row a benchmark that both have, and `overall` when there are several. Raises UserError for other items."""
    common = [name for name in a if name in b]
    if not common:
        raise UserError(f"no benchmark in common: {', '.join(a)} and {', '.join(b)}")
    rows, boots, means = [], [], []
    for place, name in enumerate(common):
        if a[name].keys() != b[name].keys():
            both = len(a[name].keys() & b[name].keys())
            raise UserError(
                f"`{name}` has {len(a[name])} items in one evaluation and {len(b[name])} in the other, "
                f"{both} in common",
                "evaluate both on the same benchmark file",
            )
        pairs = np.array([(a[name][item], b[name][item]) for item in sorted(a[name])])
        boot = _resampled(pairs[:, 1] - pairs[:, 0], np.random.default_rng([seed, place]), draws)
        first, second = (float(x) for x in pairs.mean(axis=0))
        rows.append(_row(name, len(pairs), first, second, boot))
        boots.append(boot)
        means.append((first, second))
    if len(rows) > 1:
        first, second = (float(x) for x in np.mean(means, axis=0))
        rows.append(_row("overall", sum(row.items for row in rows), first, second, np.mean(boots, axis=0)))
    return rows


def _resampled(differences: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """[draws] means of resampled item differences [items]; in blocks, so that memory stays under some 50 MB."""
    block = max(1, 4_000_000 // len(differences))
    means = [
        differences[rng.integers(0, len(differences), (min(block, draws - done), len(differences)))].mean(axis=1)
        for done in range(0, draws, block)
    ]
    return np.concatenate(means)


def _row(name: str, items: int, a: float, b: float, boot: np.ndarray) -> Difference:
    low, high = (float(x) for x in np.quantile(boot, [0.025, 0.975]))
    beyond = min(int((boot <= 0).sum()), int((boot >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (len(boot) + 1))
    return Difference(name, items, a, b, b - a, low, high, p, low > 0 or high < 0)


def words(row: Difference) -> str:
    """`better by 0.237, 95 % interval 0.21 to 0.26, p 0.0002: a real difference`"""
    if not row.real:
        return f"no real difference: {row.difference:+.3f}, 95 % interval {row.low:+.3f} to {row.high:+.3f}"
    side = "B is better" if row.difference > 0 else "A is better"
    return f"{side}: {row.difference:+.3f}, 95 % interval {row.low:+.3f} to {row.high:+.3f}"


def document(a: str, b: str, rows: list[Difference]) -> Mapping[str, object]:
    return {"a": a, "b": b, "draws": DRAWS, "benchmarks": [vars(row) for row in rows]}
