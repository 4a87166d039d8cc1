"""Which files a run's training problems are read from: items of benchmarks left out, and the same ones on a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import recipe_data
from astracli.config.benchmarks import get
from astracli.config.recipe import Recipe
from astracli.config.recipe_data import DataTable
from astracli.errors import UserError
from astracli.process.atomic import write_atomic
from astracli.process.console import say
from astracli.runs.run_dir import RunDir

if TYPE_CHECKING:
    from astracli.data.prompts import Problem

FILE = "data.json"
"""In a run directory: of each source its file, rows and fingerprint. They say what a place in its order means."""


def pin(run: RunDir, recipe: Recipe, paths: Mapping[str, Path | None]) -> None:
    """Write down which problems a run begins with."""
    file = run.path / FILE
    now = _fingerprints(recipe, paths) if not file.exists() else {}
    if now:
        write_atomic(file, json.dumps(now[""] if list(now) == [""] else now, indent=2) + "\n")


def check(run: RunDir, recipe: Recipe, paths: Mapping[str, Path | None]) -> None:
    """Raises UserError unless the problems are those that the run began with."""
    then = _recorded(run)
    for name, found in _fingerprints(recipe, paths).items() if then else ():
        if then[name]["fingerprint"] == found["fingerprint"]:
            continue
        hint = "a resumed run goes on at its place in their order: put the old file back, or start a new run"
        if recipe.data.decontaminate == "remove":
            hint += (
                "; it began without the items of its benchmarks, in a file that is gone: with the same eval.benchmarks "
                "it is made again"
            )
        raise UserError(
            f"the training problems are others than when `{run.path}` began: {then[name]['rows']} rows of "
            f"`{then[name]['path']}` then, {found['rows']} of `{found['path']}` now",
            hint,
        )


def decontaminated(
    recipe: Recipe,
    paths: Mapping[str, str | None],
    fetched: Mapping[str, str | None],
    resumed: RunDir | None = None,
) -> dict[str, Path | None]:
    """The training problems to use, after `data.decontaminate`. Raises UserError when none would be left.

    `fetched`: benchmarks. A run that is `resumed` goes on with the problems it began with, whatever benchmarks it has
    now: where these hold some of them, that is said.
    """
    from astracli.data import benchmarks as sets

    written = [name for name, place in fetched.items() if place is not None and not get(name, recipe).held_out]
    items = {}
    if recipe.data.decontaminate != "off" and any(paths.values()):
        items = {name: sets.load(name, fetched[name], recipe=recipe).items for name in written}
    tables = recipe_data.sets(recipe.training_data)
    then = _recorded(resumed) if resumed is not None and recipe.data.decontaminate == "remove" else {}
    found: dict[str, Path | None] = {}
    for name, path in paths.items():
        began = Path(then[name]["path"]) if name in then else None
        if path is not None and began is not None and began.is_file():
            found[name] = began
            _tell(tables[name], began, items, "stay in: a resumed run keeps the problems that it began with")
        else:
            found[name] = _decontaminated(tables[name], path, items) if path else None
    return found


def _decontaminated(data: DataTable, path: str, items: Mapping[str, Sequence[Problem]]) -> Path:
    """The file of one source, or one without the rows that are items of benchmarks."""
    from astracli.data import datasets, decontamination

    if not items:
        return Path(path)
    if data.decontaminate == "report":
        _tell(data, Path(path), items, "leave them out with `--set data.decontaminate=remove`")
        return Path(path)
    problems = datasets.load(data, path, "all")
    found = decontamination.find(problems, items)
    if not found:
        return Path(path)
    said = decontamination.summary(found, len(problems))
    if len(found) == len(problems):
        raise UserError(said, "nothing would be left to train on; train on another set")
    say(f"{said}: left out")
    folder = datasets.cache_dir() / "datasets"
    return decontamination.write_without(Path(path), data.split, found, folder, config=data.config)


def _tell(data: DataTable, path: Path, items: Mapping[str, Sequence[Problem]], what: str) -> None:
    """Warn of problems that are items of benchmarks."""
    from astracli.data import datasets, decontamination

    problems = datasets.load(data, path, "all") if items else []
    if found := decontamination.find(problems, items):
        say(f"warning: {decontamination.summary(found, len(problems))}; {what}")


def _fingerprints(recipe: Recipe, paths: Mapping[str, Path | None]) -> dict[str, dict[str, Any]]:
    from astracli.data import datasets

    tables, found = recipe_data.sets(recipe.training_data), {}
    for name, path in paths.items():
        if path is not None:
            problems = datasets.load(tables[name], path)
            found[name] = {"path": str(path), "rows": len(problems), "fingerprint": problems.fingerprint}
    return found


def _recorded(run: RunDir) -> dict[str, dict[str, Any]]:
    """By source, "" of a single one; {} where nothing was written down."""
    file = run.path / FILE
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {"": found} if "fingerprint" in found else found
