"""Run directories: a fresh one, a used one to go on with, one by its name, and all that there are."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import cache
from pathlib import Path

from astracli.config import reading
from astracli.errors import UserError
from astracli.process.console import say
from astracli.runs.run_dir import RunDir

RUNS = Path("runs")


def create(recipe_name: str, run_dir: Path | None = None, *, root: Path = RUNS) -> RunDir:
    """A fresh, locked run directory: `root/RECIPE-YYYYmmdd-HHMMSS`, or `run_dir` when it is new or empty.

    Raises UserError when `run_dir` was used before (the message names every way out) or cannot be made.
    """
    try:
        path = run_dir if run_dir is not None else _fresh(recipe_name, root)
        path.mkdir(parents=True, exist_ok=True)
        run = RunDir(path)
        if any(entry.name != ".lock" for entry in path.iterdir()):
            raise _used(run)
        run.lock()
    except FileExistsError:
        raise UserError(f"`{run_dir}` is a file, not a run directory", "give another --run-dir") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot make run directory `{run_dir or root}`: {reason}", "give another --run-dir") from None
    return run


def resume(path: Path) -> RunDir:
    """A used run directory, locked, to be continued. Raises UserError when it holds no run or is in use."""
    run = existing(path)
    run.lock()
    return run


def existing(path: Path) -> RunDir:
    """The run in `path`. Raises UserError when there is none."""
    run = RunDir(path)
    if not reading.is_file(run.recipe_json):
        if reading.is_dir(path) and not run.readable():
            raise UserError(f"run `{path}` cannot be read by this user", "ask the user whose run it is")
        why = "holds no recipe.json" if reading.is_dir(path) else "does not exist"
        raise UserError(f"`{path}` is no run: it {why}", "`astra runs list` shows the runs under runs/")
    return run


def named(text: str, *, root: Path = RUNS) -> RunDir:
    """A run by path, or by name under `root`. Raises UserError."""
    under_root = root / text
    return existing(under_root if "/" not in text and reading.is_dir(under_root) else Path(text))


def list_runs(root: Path = RUNS) -> list[RunDir]:
    """The runs under `root`, newest first."""
    places = root.iterdir() if reading.is_dir(root) else ()
    found = [RunDir(path) for path in places if reading.is_dir(path)]
    closed = sorted(run.name for run in found if not run.readable())
    if closed:
        _say_left_out(root, tuple(closed))
    runs = [run for run in found if run.name not in closed and reading.is_file(run.recipe_json)]
    return sorted(runs, key=lambda run: (_started(run), run.name), reverse=True)


@cache
def _say_left_out(root: Path, names: tuple[str, ...]) -> None:
    """Once in a command."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    say(f"note: left out under `{root}`, this user may not read it: {', '.join(names[:3])}{more}")


def newest(root: Path = RUNS, commands: Collection[str] = ()) -> RunDir | None:
    """The run under `root` that started last, of one of the `commands` if there is one; None when there is none."""
    found = list_runs(root)
    kind = [run for run in found if (status := run.readable_status()) is not None and status.command in commands]
    return next(iter(kind or found), None)


def _started(run: RunDir) -> float:
    status = run.readable_status()
    return status.started if status else run.recipe_json.stat().st_mtime


def _fresh(recipe_name: str, root: Path) -> Path:
    """A name under `root` that this call made; two runs of one second get different names."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in recipe_name)
    base = f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = root / (base if number == 1 else f"{base}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _used(run: RunDir) -> UserError:
    if not run.recipe_json.is_file():
        return UserError(
            f"run directory `{run.path}` is not empty and holds no run", "give another --run-dir, or empty it"
        )
    status = run.status()
    if status is not None and run.going():
        return UserError(
            f"run directory `{run.path}` is in use (state: {status.shown()})",
            f"look at it with `astra runs status {run.path}`, or give another directory",
        )
    if status is not None and status.command == "eval":
        go_on = "" if status.state == "done" else f"go on with it by `astra eval --resume {run.path}`, "
        return UserError(
            f"`{run.path}` holds an evaluation already (state: {run.shown_state()})",
            f"{go_on}give another --out, or remove it with `rm -r {run.path}`",
        )
    return UserError(
        f"run directory `{run.path}` was used before (state: {run.shown_state()})",
        f"continue it with `astra train --resume {run.path}`, give another --run-dir, leave --run-dir out for a new "
        f"name under runs/, or remove it with `rm -r {run.path}`",
    )
