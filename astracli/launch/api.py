"""astra from Python: load a recipe, train, go on, evaluate, look at runs. `astracli` itself offers these names.

    import astracli

    recipe = astracli.load("qwen3.5-tiny-m2po-delta", {"train.steps": 20})
    run = astracli.train(recipe)
    print(run.series("reward_mean"), run.scores())

A call does what the command of the same name does, in this process: it starts engines and workers as processes of their
own, shows the run on stderr, and returns when the run has ended. Bad input raises UserError before anything starts, a
run that fails RunFailed, and one that is interrupted KeyboardInterrupt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.runs import changes as run_changes
from astracli.runs import find, metrics
from astracli.runs.run_dir import RunDir

if TYPE_CHECKING:
    from astracli.evaluation.compare import Against
    from astracli.report.run_files import Outcome
    from astracli.training.best import Score

Changes = Mapping[str, Any]
"""Dotted key of a recipe -> value, as `{"train.steps": 20, "eval.benchmarks": ["gsm8k"]}`."""


@dataclass(frozen=True)
class Run:
    """A run directory: of training, of an evaluation, or of `astra rollout`. Read anew at every question."""

    path: Path

    @property
    def state(self) -> str:
        """`running`, `done`, `failed`, `interrupted`, `dead (resumable)` or `not started`"""
        return self._dir.shown_state()

    @property
    def step(self) -> int:
        """Steps trained so far."""
        status = self._dir.status()
        return status.step if status is not None else 0

    @property
    def recipe(self) -> Recipe:
        """As it runs, or ran last, with every default filled in."""
        return recipe_io.load(self._dir.recipe_json)

    @property
    def export_path(self) -> Path:
        """The last version of a finished run as a Hugging Face directory."""
        return self._dir.export

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl (docs/run-directory.md). A step stands twice when a resume trained it again."""
        return metrics.read(self._dir.metrics_jsonl)

    def series(self, name: str, process: str | None = None) -> list[tuple[int, float]]:
        """[(step, value)] of one metric, in the order of steps; of a step that stands twice the later value."""
        return metrics.series(self.metrics(), name, process)

    def scores(self) -> list[Score]:
        """Its evaluations in the order of steps: `overall` of several benchmarks, else the only one."""
        from astracli.report import many_runs

        return many_runs.scores(self._dir)

    def results(self) -> dict[str, dict[str, Any]]:
        """Benchmark -> figures, of a directory that `evaluate` returned. Raises UserError for any other."""
        from astracli.report import run_files

        found = run_files.results(self._dir)
        if found is None:
            raise UserError(f"`{self.path}` holds no results of an evaluation", "scores of a training run: `scores()`")
        results: dict[str, dict[str, Any]] = found["results"]
        return results

    def samples(self, *, outcome: Outcome | None = None, step: int | None = None) -> Iterator[dict[str, Any]]:
        """Samples on disk: some rollouts of every step, or all answers of an evaluation."""
        from astracli.report import run_files

        return run_files.samples(self._dir, outcomes={outcome} if outcome else set(), step=step)

    def summary(self) -> dict[str, Any] | None:
        """summary.json; None while the run goes on."""
        from astracli.report import run_files

        return run_files.summary(self._dir)

    def changes(self) -> list[dict[str, Any]]:
        """What resumes changed in its recipe, each with the first step that was trained so."""
        return run_changes.read(self._dir)

    def best_step(self) -> int:
        """Step of the checkpoint that `checkpoint.best` keeps. Raises UserError when there is none."""
        from astracli.training import best

        return best.required(self._dir, self.recipe).score.step

    @property
    def _dir(self) -> RunDir:
        return RunDir(self.path)


def load(recipe: str | Path, changes: Changes | None = None) -> Recipe:
    """A shipped recipe by name, or a .toml file or a run's recipe.json by path, with changes. Raises UserError."""
    return changed(recipe_io.load(recipe), changes)


def changed(recipe: Recipe, changes: Changes | None) -> Recipe:
    """The recipe with other values, checked. Raises UserError."""
    if not changes:
        return recipe
    document = recipe_io.to_document(recipe)
    for key, value in changes.items():
        *tables, last = key.split(".")
        table = document
        for name in tables:
            if table.get(name) is None:  # an optional table that the recipe does not have yet
                table[name] = {}
            if not isinstance(table[name], dict):
                raise UserError(f"`{key}`: `{name}` is a value, not a table")
            table = table[name]
        table[last] = str(value) if isinstance(value, Path) else value
    return recipe_io.check(document, recipe.name)


def train(
    recipe: Recipe | str | Path | None = None,
    changes: Changes | None = None,
    *,
    run_dir: str | Path | None = None,
    start_from: Run | str | Path | None = None,
    keep_optimizer: bool = False,
) -> Run:
    """`astra train`. `start_from`: a run, `RUN@STEP` or `RUN@best`, from whose weights it starts; its recipe is then
    the one to take where none is given."""
    from astracli.launch import from_run
    from astracli.launch import run as launch

    if start_from is None and keep_optimizer:
        raise UserError("keep_optimizer without start_from", "a resumed run keeps its optimizer state anyway")
    if start_from is None and recipe is None:
        raise UserError("no recipe given", 'for example `astracli.train("qwen3.5-tiny-m2po-delta")`')
    source = None
    if start_from is not None:
        named = start_from.path if isinstance(start_from, Run) else start_from
        source = from_run.find(str(named), keep_optimizer=keep_optimizer)
        recipe = source.recipe if recipe is None else recipe
    assert recipe is not None
    asked = changed(recipe if isinstance(recipe, Recipe) else load(recipe), changes)
    where = Path(run_dir) if run_dir is not None else None
    return _ended(*launch.train_run(asked, run_dir=where, source=source, keep_optimizer=keep_optimizer))


def sft(
    recipe: Recipe | str | Path,
    changes: Changes | None = None,
    *,
    run_dir: str | Path | None = None,
    start_from: Run | str | Path | None = None,
) -> Run:
    """`astra sft`: supervised training by a recipe with a table `[sft]`. `start_from`: as `train` has it."""
    from astracli.launch import from_run
    from astracli.launch import run as launch

    asked = changed(recipe if isinstance(recipe, Recipe) else load(recipe), changes)
    named = start_from.path if isinstance(start_from, Run) else start_from
    source = from_run.find(str(named)) if named is not None else None
    where = Path(run_dir) if run_dir is not None else None
    return _ended(*launch.train_run(asked, command="sft", run_dir=where, source=source))


def resume(run: Run | str | Path, changes: Changes | None = None) -> Run:
    """`astra train --resume`: go on with a run from its checkpoint, with what may change changed."""
    from astracli.launch import run as launch

    found = _found(run)
    return _ended(*launch.train_run(changed(found.recipe, changes), resume=found.path))


def evaluate(
    what: Run | Recipe | str | Path,
    changes: Changes | None = None,
    *,
    weights: str | Path | None = None,
    benchmarks: list[str] | None = None,
    samples: int | None = None,
    out: str | Path | None = None,
) -> Run:
    """`astra eval`: a run's export by its own recipe, or a recipe's model or `weights`. -> the evaluation, whose
    `results()` are its figures."""
    from astracli.launch import run as launch

    run_dir = None
    if isinstance(what, Run):
        run_dir, recipe = what.path, what.recipe
        weights = weights if weights is not None else what.export_path
    else:
        recipe = what if isinstance(what, Recipe) else load(what)
    return _ended(
        *launch.evaluate_run(
            changed(recipe, changes),
            weights=str(weights) if weights is not None else None,
            run_dir=run_dir,
            benchmarks=benchmarks,
            samples=samples,
            out=Path(out) if out is not None else None,
        )
    )


def list_runs(root: str | Path = find.RUNS) -> list[Run]:
    """The runs under a folder, newest first."""
    return [Run(run.path) for run in find.list_runs(Path(root))]


def compare(*runs: Run | str | Path) -> list[Against]:
    """A paired test over items of each run's newest evaluation against the first run's, as `astra runs compare` makes
    it. Raises UserError when they have no benchmark in common."""
    from astracli.evaluation import compare as comparison

    named = [str(run.path if isinstance(run, Run) else run) for run in runs]
    if len(set(named)) < 2:
        raise UserError("a comparison takes two runs or more")
    return comparison.several({text: comparison.read_shares(text) for text in named})


def _found(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run(find.named(str(run)).path)


def _ended(code: int, run: RunDir) -> Run:
    if code == 130:
        raise KeyboardInterrupt(f"`{run.path}` was interrupted")
    return Run(run.path)
