"""One byte wrong in a file of a run: in a checkpoint, a version of the weights, the hub's database, metrics.jsonl; and
files that are whole, and are another run's or of another time."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path

from loop.books import acked

from faults.world import Row, World, attempted

PARTS = {
    "checkpoint": "checkpoints/*/*", "weights": "weights/*/*", "hub": "hub.sqlite", "hub log": "hub.sqlite-wal",
    "metrics": "metrics.jsonl", "status": "status.json", "recipe": "recipe.json", "evaluations": "eval/eval.csv",
    "eval items": "eval/items/*", "partial evaluation": "eval/partial/*/*",
}  # fmt: skip
CAUSES = {
    "hub": (r"hub\.sqlite",),
    "hub log": (r"hub\.sqlite",),
    "status": (r"status\.json` is damaged",),
    "recipe": (r"recipe\.json",),
}
"""What a resume may end with. A damaged checkpoint is left out and said, whatever else is damaged costs nothing."""


def flip(file: Path, draw: random.Random) -> str:
    """Another value for one byte. -> which"""
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= draw.randrange(1, 256)
    file.write_bytes(data)
    return f"{file.parent.name}/{file.name}, byte {place} of {len(data)}"


def resumed(world: World, name: str, part: str, row: Row) -> Row:
    """A copy of a run that was killed, one byte, and its resume: to its end with whole books, or refused by name."""
    run = world.copy(name)
    if part == "hub":  # all of it is in the log until a log is folded in
        with closing(sqlite3.connect(run / "hub.sqlite")) as hub:
            hub.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    files = sorted(file for file in run.glob(PARTS[part]) if file.is_file() and file.stat().st_size)
    if not files:
        row.outcome = "not met: no such file"
        return row
    goal = acked(run) + 2  # as the whole database knows it
    row.where = flip(world.draw.choice(files), world.draw)
    attempt = world.start(run, None, [f"train.steps={goal}"])
    row = world.judge(row, attempt, CAUSES.get(part, ()))
    if row.outcome == "finished":
        row.problems += world.books(run)
    return row


def rows(world: World, times: int, parts: list[str]) -> list[Row]:
    found = []
    for part, number in product(parts, range(times)):
        work = partial(resumed, world, f"{part}{number}".replace(" ", ""), part)
        found.append(attempted(Row(f"one byte wrong, {part}", ""), work))
    return found


# ---- files that are whole, and are not this run's


def _of_other(run: Path, other: Path, pattern: str) -> None:
    for file in [*run.glob(pattern)]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in other.glob(pattern):
        (shutil.copytree if file.is_dir() else shutil.copy2)(file, run / file.relative_to(other))


def _cut(file: Path, part: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])


def _dated(run: Path, seconds: float) -> None:
    """Every file and folder as if its clock had been elsewhere."""
    for path in [*run.rglob("*"), run]:
        os.utime(path, (seconds, seconds), follow_symlinks=False)


STATES: dict[str, tuple[Callable[[Path, Path], None], tuple[str, ...]]] = {
    "hub of another run": (
        lambda run, other: _of_other(run, other, "hub.sqlite*"),
        (r"hub\.sqlite and the checkpoint",),
    ),
    "checkpoints of another run": (
        lambda run, other: _of_other(run, other, "checkpoints/step_000006"),
        (r"hub\.sqlite and the checkpoint",),
    ),
    "weights of another run": (lambda run, other: _of_other(run, other, "weights/*"), ()),
    "status of another run": (lambda run, other: _of_other(run, other, "status.json"), ()),
    "metrics empty": (lambda run, _: _cut(run / "metrics.jsonl", 0.0), ()),
    "metrics cut within a line": (lambda run, _: _cut(run / "metrics.jsonl", 0.5), ()),
    "files from 1970": (lambda run, _: _dated(run, 0.0), ()),
    "files ten years ahead": (lambda run, _: _dated(run, time.time() + 315_360_000), ()),
}
"""What is done to a run that was killed, given another one; what its resume may end with, else it must finish."""


def states(world: World, names: Sequence[str]) -> list[Row]:
    other = World(world.folder / "other", seed=1).template(7)

    def one(row: Row, name: str) -> Row:
        change, causes = STATES[name]
        run = world.copy(name.replace(" ", "_"))
        goal = acked(run) + 2
        change(run, other)
        row = world.judge(row, world.start(run, None, [f"train.steps={goal}"]), causes)
        if row.outcome == "finished" and not name.startswith("metrics"):  # the books are read there
            row.problems += world.books(run)
        return row

    return [attempted(Row(name, "before a resume"), partial(one, name=name)) for name in names]
