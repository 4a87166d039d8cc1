"""Several runs beside each other: newest score and reward of each, the settings that differ, curves in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from astracli.config import reading
from astracli.errors import UserError
from astracli.report import run_files
from astracli.runs import documents, metrics
from astracli.runs.changes import shown
from astracli.runs.names import REWARD
from astracli.runs.run_dir import RunDir
from astracli.training.best import Score

TAIL_BYTES = 1 << 19
"""Of metrics.jsonl, read for the newest reward."""
REWARD_STEPS = 10
NO_SETTING = ("name", "description", "expected", "model.made_by")
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def scores(run: RunDir, names: Sequence[str] = ()) -> list[Score]:
    """A run's evaluations, in the order of steps: `overall` of several benchmarks, else the one that there is.

    `names`: the mean over these alone, of the evaluations that have all of them.
    """
    rows = run_files.eval_rows(run)
    every = [name for name in rows if name != metrics.OVERALL]
    if names and set(names) != set(every):
        return _means({name: [Score.of(name, row) for row in rows[name]] for name in names})
    name = metrics.OVERALL if len(every) > 1 else next(iter(every), None)
    if name is None:
        return []
    return [Score.of(name, row) for row in rows[name]]


def _means(each: Mapping[str, Sequence[Score]]) -> list[Score]:
    """The unweighted mean over some benchmarks at every step that has all of them."""
    if len(each) == 1:
        return list(*each.values())
    by_step = [{score.step: score for score in of_one} for of_one in each.values()]
    found = []
    for step in sorted(set.intersection(*(set(steps) for steps in by_step))):
        at = [steps[step] for steps in by_step]
        stderr = math.sqrt(sum(score.stderr**2 for score in at)) / len(at)
        mean = sum(score.avg_at_n for score in at) / len(at)
        found.append(Score(metrics.OVERALL, step, min(score.n for score in at), mean, stderr))
    return found


def common_benchmarks(runs: Sequence[RunDir]) -> list[str]:
    """Benchmarks that all evaluated ones of some runs have: their scores compare on these."""
    each = [[name for name in run_files.eval_rows(run) if name != metrics.OVERALL] for run in runs]
    evaluated = [names for names in each if names]
    return [name for name in evaluated[0] if all(name in names for names in evaluated)] if evaluated else []


def graders(runs: Sequence[RunDir], names: Sequence[str]) -> dict[str, list[str]]:
    """What graded each of some benchmarks in each run, of those that were not graded alike. Old runs do not say."""
    each = [run_files.eval_rows(run) for run in runs]
    found = {name: [rows[name][-1].get("grader") or "" if name in rows else "" for rows in each] for name in names}
    return {name: of for name, of in found.items() if len(set(of) - {""}) > 1}


def newest_reward(run: RunDir) -> float | None:
    """Mean over the newest `REWARD_STEPS` steps of the reward of all that arrived, from the end of metrics.jsonl; None
    before the first one, and where that file cannot be read: other runs stand in the same list."""
    try:
        with reading.opened(run.metrics_jsonl) as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    return metrics.mean([value for _, value in rewards(list(metrics.parse(lines)))[-REWARD_STEPS:]])


def rewards(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """[(step, reward of all that arrived)], in the order of steps; not of a step during which nothing arrived."""
    return metrics.series(map(metrics.without_absent, map(dict, records)), REWARD, "trainer")


def row(run: RunDir) -> dict[str, Any]:
    """`run_files.row`, with newest score and reward. Of a damaged `eval.csv` there is no score: other runs stand in the
    same list."""
    try:
        newest = next(iter(scores(run)[-1:]), None)
    except UserError:
        newest = None
    return run_files.row(run) | {"score": vars(newest) if newest else None, "reward": newest_reward(run)}


def settings(runs: Sequence[RunDir], *, skip_damaged: bool = False) -> dict[str, list[Any]]:
    """Dotted key -> its value in every run, of those keys in which the runs' recipes differ, in the schema's order.

    With `skip_damaged` a run whose recipe cannot be read has the values of the first that can be.
    """
    flat: list[dict[str, Any] | None] = []
    for run in runs:
        try:
            flat.append(_flat(documents.document(run.recipe_json)))
        except UserError:
            if not skip_damaged:
                raise
            flat.append(None)
    first = next((each for each in flat if each is not None), {})
    each_run = [first if each is None else each for each in flat]
    keys = dict.fromkeys(key for each in each_run for key in each)
    values = {key: [each.get(key) for each in each_run] for key in keys if not _no_setting(key)}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _no_setting(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NO_SETTING)


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differing_words(differ: Mapping[str, Sequence[Any]], place: int, most: int = 6) -> str:
    """What one run has of the settings that differ: `train.learning_rate=1e-05 seed=3`, and how many more."""
    words = [f"{key}={shown(values[place])}" for key, values in differ.items()]
    return " ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], *, width: int = 72, height: int = 12) -> list[str]:
    """Curves as text: each line's mark at its points, straight in between as `.`, `*` where marks meet; with the range
    of both axes. [] when there is no point."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return []
    (left, right), (bottom, top) = ((min(each), max(each)) for each in zip(*points, strict=True))
    labels = [f"{value:.4g}" for value in (top, bottom)]
    edge = max(map(len, labels))
    columns = max(10, width - edge - 3)
    grid = [[" "] * columns for _ in range(height)]

    def place(x: float, y: float) -> tuple[int, int]:
        column = round((x - left) / (right - left) * (columns - 1)) if right > left else 0
        level = round((y - bottom) / (top - bottom) * (height - 1)) if top > bottom else 0
        return height - 1 - level, column

    for line in lines.values():
        for (x0, y0), (x1, y1) in pairwise(line):
            first, last = place(x0, y0)[1], place(x1, y1)[1]
            for column in range(first + 1, last):
                at, _ = place(x0, y0 + (y1 - y0) * (column - first) / (last - first))
                grid[at][column] = "." if grid[at][column] == " " else grid[at][column]
    for mark, line in lines.items():
        for x, y in line:
            at, column = place(x, y)
            grid[at][column] = mark if grid[at][column] in (" ", ".", mark) else "*"
    sides = [labels[0].rjust(edge), *[" " * edge] * (height - 2), labels[1].rjust(edge)]
    rows = [f"{side} | {''.join(cells).rstrip()}".rstrip() for side, cells in zip(sides, grid, strict=True)]
    ends = f"{left:g}", f"{right:g}"
    axis = " " * (edge + 3) + ends[0] + ends[1].rjust(columns - len(ends[0]))
    return [*rows, f"{' ' * edge} +{'-' * (columns + 1)}", axis]
