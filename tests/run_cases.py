"""Run directories as a run leaves them, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

from astracli.config import recipe_io
from astracli.runs.run_dir import RunDir

TINY = "qwen3.5-tiny-m2po-delta"


def make_run(path: Path, *, state: str = "done", started: float = 1000.0, export: bool = False) -> RunDir:
    """A run of the tiny recipe, at step 40 of 100; one that ended took 60 s."""
    path.mkdir(parents=True)
    run = RunDir(path)
    run.recipe_json.write_text(recipe_io.to_json(recipe_io.load(TINY, ["seed=5"])))
    run.start(recipe=TINY, steps=100, step=40)
    run.end(state, exit_code=0) if state != "running" else None  # type: ignore[arg-type,func-returns-value]
    run.update(started=started, ended=None if state == "running" else started + 60)
    if export:
        run.export.mkdir()
        (run.export / "config.json").write_text("{}")
    return run
