"""One byte wrong in a file of a run: in a checkpoint, a version of the weights, the hub's database, metrics.jsonl."""

from __future__ import annotations

import random
import sqlite3
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
