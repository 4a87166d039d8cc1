"""Slow, cut, silent and lying connections between the processes of a run, and a clock that steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loop.exactness import difference
from loop.kill_resume import Attempt

from faults.relay import Relay, Weather
from faults.world import Row, World, attempted

HOOK = Path(__file__).parent / "hook"
SILENT = (r"did not answer", r"`rollout`", r"`engine0`", r"`trainer`", r"`eval`")
WRONG = (r"`rollout`", r"`engine0`", r"`trainer`", r"`eval`")
EXACT = ("launch.deterministic=true", "train.max_staleness=0")
FLIP_EVERY = 60_000
"""Bytes; a run of eight steps passes about three million."""


def hooked(**what: str) -> dict[str, str]:
    """The environment of an attempt whose processes read `hook/sitecustomize.py`."""
    return {"PYTHONPATH": str(HOOK), **what}


def through(world: World, name: str, work: Callable[[Attempt, Relay], None], row: Row) -> Row:
    """A run whose connections pass through a relay; `work` makes the weather and returns when it is fair again."""
    relay = Relay(world.tmp.parent / f"relay_{name}", world.draw)
    try:
        run = world.folder / name
        attempt = world.start(run, 12, env=hooked(ASTRA_FAULTS_RELAY=str(relay.folder)))
        attempt.wait(lambda: len(attempt.steps()) >= 2)
        work(attempt, relay)
        relay.weather = Weather()
        row = world.judge(row, attempt, SILENT)
    finally:
        relay.close()
    return world.finish(run, row) if row.outcome != "finished" else _with_books(world, run, row)


def _with_books(world: World, run: Path, row: Row) -> Row:
    row.problems += world.books(run)
    return row


def _slow(attempt: Attempt, relay: Relay) -> None:
    relay.weather = Weather(delay_s=0.05, bytes_per_s=2e6)
    attempt.wait(lambda: len(attempt.steps()) >= 8)


def _cut(attempt: Attempt, relay: Relay) -> None:
    for _ in range(12):
        time.sleep(relay.draw.uniform(0.05, 0.3))
        relay.cut()


def _refused(attempt: Attempt, relay: Relay, seconds: float) -> None:
    relay.weather = Weather(refuse=True)
    relay.cut()
    time.sleep(seconds)


def _silent(attempt: Attempt, relay: Relay, seconds: float) -> None:
    relay.weather = Weather(hold=True)
    time.sleep(seconds)


WEATHERS: dict[str, Callable[[Attempt, Relay], None]] = {
    "slow: 50 ms and 2 MB/s": _slow,
    "all connections cut, 12 times": _cut,
    "refused for 5 s": partial(_refused, seconds=5.0),
    "refused for 20 s": partial(_refused, seconds=20.0),
    "nothing passes for 15 s": partial(_silent, seconds=15.0),
}


def rows(world: World) -> list[Row]:
    return [
        attempted(Row("network", name), partial(through, world, f"net{number}", work))
        for number, (name, work) in enumerate(WEATHERS.items())
    ]


# ---- one byte wrong on the wire


def damaged(world: World, attempts: int) -> list[Row]:
    """A deterministic run through a relay that changes a byte now and then, resumed as often as it ends. Its files must
    be, to the byte, those of a run that nobody disturbed: then no damage passed unseen."""
    alone, run, steps = world.folder / "alone", world.folder / "wire", 8
    code, console = world.start(alone, steps, EXACT).end()
    assert code == 0, console
    relay = Relay(world.folder / "relay_wire", world.draw, Weather(flip_every=FLIP_EVERY))
    env = hooked(ASTRA_FAULTS_RELAY=str(relay.folder))
    rows: list[Row] = []
    while len(rows) < attempts and not (rows and rows[-1].outcome == "finished"):
        before = len(relay.flips)
        goal = [] if not rows else [f"train.steps={steps}"]
        attempt = world.start(run, None if rows else steps, [*goal, *(() if rows else EXACT)], env=env)
        row = attempted(Row("one byte wrong on the wire", ""), lambda row, a=attempt: world.judge(row, a, WRONG))
        row.where = f"{len(relay.flips) - before} bytes; the last {relay.flips[-1] if relay.flips else ''}"[:160]
        rows.append(row)
    relay.weather = Weather()
    if rows[-1].outcome != "finished":
        world.start(run, None, [f"train.steps={steps}"], env=env).end()
    relay.close()
    odd = difference(alone, run, whole=False)
    last = Row("wire", f"{len(relay.flips)} bytes changed", "compared with a run that nobody disturbed")
    last.problems = [f"differs: {name}" for name in odd[:6]]
    return [*rows, last]


# ---- the clock


def clock(world: World, row: Row, name: str, jumps: tuple[float, ...]) -> Row:
    """A run whose clock steps by so many seconds, one after the other: Python's clock, as every part of a run reads it.
    (libfaketime 0.9.10 makes `time.sleep` fail in Python 3.11.)"""
    file = world.folder / f"{name}.clock"
    file.write_text("0")
    run = world.folder / name
    attempt = world.start(run, 12, env=hooked(ASTRA_FAULTS_CLOCK=str(file)))
    for number, jump in enumerate(jumps):
        attempt.wait(lambda n=number: len(attempt.steps()) >= 2 * (n + 1))  # type: ignore[misc]
        file.write_text(str(jump))
    return _with_books(world, run, world.judge(row, attempt, ()))


def clocks(world: World) -> list[Row]:
    jumps = (3600.0, -86400.0, 400_000_000.0, 0.0)
    row = Row("clock steps", f"{', '.join(f'{jump:+g}' for jump in jumps)} s")
    return [attempted(row, lambda row: clock(world, row, "clock", jumps))]
