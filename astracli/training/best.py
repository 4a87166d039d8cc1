"""Which checkpoint scored best on a benchmark (`checkpoint.best`): kept by retention, exported by `--best`.

Scores are those of RUN_DIR/eval/eval.csv. Only an evaluated step that has a checkpoint counts; of equal scores the
earlier step. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from astracli.config import benchmarks
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.runs import documents
from astracli.runs.metrics import OVERALL
from astracli.runs.run_dir import RunDir
from astracli.training import checkpoint


@dataclass(frozen=True)
class Score:
    """One benchmark, or the mean over several, at one step; fractions."""

    benchmark: str
    step: int
    n: int
    avg_at_n: float
    stderr: float

    @classmethod
    def of(cls, benchmark: str, row: Mapping[str, Any]) -> Score:
        """From a row of `eval.csv`."""
        return cls(benchmark, int(row["step"]), int(row["n"]), float(row["avg_at_n"]), float(row["stderr"]))

    @property
    def words(self) -> str:
        """`arithmetic-heldout avg@8 0.412 ± 0.011`"""
        return f"{self.benchmark} avg@{self.n} {self.avg_at_n:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best score, and what it was chosen from."""

    score: Score
    path: Path
    among: int
    """Evaluated steps behind step 0, those whose checkpoint retention has removed included."""
    start: Score | None
    """Of the model that the run started from, when it was evaluated: it has no checkpoint and is never chosen."""

    def document(self) -> dict[str, Any]:
        return {**asdict(self.score), "among": self.among, "start": asdict(self.start) if self.start else None}


def name_in_files(recipe: Recipe) -> str | None:
    """What `checkpoint.best` is called in `eval.csv`: a set of one's own is named there without its folder."""
    wanted = recipe.checkpoint.best
    return wanted if wanted is None or wanted == OVERALL else benchmarks.get(wanted, recipe).name


def scores(run: RunDir, benchmark: str) -> list[Score]:
    """The evaluations of one benchmark, in the order of steps; [] when there are none."""
    if not run.eval_csv.is_file():
        return []
    rows = [row for row in documents.evaluations(run.eval_csv) if row["benchmark"] == benchmark]
    found = [Score.of(benchmark, r) for r in rows]
    return sorted(found, key=lambda score: score.step)


def best(run: RunDir, benchmark: str) -> Best | None:
    """The best of the evaluated checkpoints that are on disk; None when there is none."""
    every = scores(run, benchmark)
    places = {score.step: checkpoint.place(run.checkpoints, score.step) for score in every}
    there = [score for score in every if (places[score.step] / checkpoint.COMPLETE).is_file()]
    if not there:
        return None
    chosen = max(there, key=lambda score: (score.avg_at_n, -score.step))
    start = next((score for score in every if score.step == 0), None)
    return Best(chosen, places[chosen.step], sum(s.step > 0 for s in every), start)


def kept(run: RunDir, recipe: Recipe, evaluated: Collection[int]) -> set[int]:
    """Steps whose checkpoint stays besides the newest: the best so far, and those that are being `evaluated` and may
    become it. None without `checkpoint.best`."""
    benchmark = name_in_files(recipe)
    if benchmark is None:
        return set()
    found = best(run, benchmark)
    return {*evaluated, *([found.score.step] if found is not None else [])}


def required(run: RunDir, recipe: Recipe) -> Best:
    """The run's best checkpoint by its own `checkpoint.best`. Raises UserError when it has none."""
    benchmark = name_in_files(recipe)
    if benchmark is None:
        names = ", ".join(recipe.eval.benchmarks) or "none"
        raise UserError(
            f"run `{run.path}` keeps no best checkpoint: its checkpoint.best is not set",
            f"name a step, or start or resume it with `--set checkpoint.best=BENCHMARK` (its benchmarks: {names})",
        )
    found = best(run, benchmark)
    if found is None:
        raise UserError(
            f"run `{run.path}` has no checkpoint that was evaluated on {benchmark}",
            "it has one after the first evaluation behind step 0; or name a step",
        )
    return found
