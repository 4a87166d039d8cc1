"""The training problems of a run before it starts: without benchmark items, and the same ones after a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.process.console import say
from astracli.runs.run_dir import RunDir, write_atomic


def pin(run: RunDir, recipe: Recipe, path: str | None) -> None:
    """Write down what a place in the training set means (`data.json`); a resume needs the same. Raises UserError."""
    from astracli.data import datasets

    if path is None:
        return
    problems = datasets.load(recipe.data, path)
    now = {"path": path, "rows": len(problems), "fingerprint": problems.fingerprint}
    file = run.path / "data.json"
    if not file.exists():
        write_atomic(file, json.dumps(now, indent=2) + "\n")
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    if then["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"the training problems are others than when `{run.path}` began: {then['rows']} rows of `{then['path']}` "
            f"then, {now['rows']} of `{path}` now",
            "a resumed run goes on at its place in their order: put the old file back, or start a new run",
        )


def decontaminated(recipe: Recipe, path: str, fetched: Mapping[str, str | None]) -> str:
    """The training problems to use, after `data.decontaminate`. Raises UserError when none would be left."""
    from astracli.data import benchmarks as sets
    from astracli.data import datasets, decontamination

    written = [name for name, place in fetched.items() if place is not None]
    if recipe.data.decontaminate == "off" or not written:
        return path
    problems = datasets.load(recipe.data, path)
    found = decontamination.find(problems, {name: sets.load(name, fetched[name]).items for name in written})
    if not found:
        return path
    said = decontamination.summary(found, len(problems))
    if recipe.data.decontaminate == "report":
        say(f"warning: {said}; leave them out with `--set data.decontaminate=remove`")
        return path
    if len(found) == len(problems):
        raise UserError(said, "nothing would be left to train on; train on another set")
    say(f"{said}: left out")
    known = datasets.known_set(recipe.data.source)
    split = known.split if known else recipe.data.split
    return str(decontamination.write_without(Path(path), split, found, datasets.cache_dir() / "datasets"))
