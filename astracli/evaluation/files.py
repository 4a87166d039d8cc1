"""What an evaluation leaves on disk: one line a sample, tables of the figures, and the samples of an unfinished one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from astracli.data.benchmarks import Benchmark
from astracli.evaluation import passk
from astracli.evaluation.benchmark import EvalSample, Result, full_figures, score_figures
from astracli.hub.types import Evaluation
from astracli.process.atomic import write_atomic
from astracli.rewards.reward import Grade
from astracli.rl.sample_log import sample_line
from astracli.runs import metrics, tables

CSV_COLUMNS = (
    "step", "version", "benchmark", "items", "n", "avg_at_n", "stderr", "k", "pass_at_k", "due_step", "grader"
)  # fmt: skip
SHARES = ("no_answer", "greedy", "greedy_no_answer")
"""Columns of `eval.csv` behind those: shares without a readable answer, and the greedy score; empty without one."""
GREEDY = "greedy"
"""The folder of the greedy samples, inside that of an evaluation."""


@dataclass(frozen=True)
class Partial:
    """The samples of a benchmark so far, in the order in which they came: one line each, appended."""

    folder: Path
    benchmark: Benchmark
    version: int | None

    @property
    def path(self) -> Path:
        return self.folder / f"{self.benchmark.name}.jsonl"

    def read(self) -> list[EvalSample]:
        """What an earlier attempt left; a torn last line and samples of another version or item are left out."""
        metrics.mend(self.path)
        problems = {problem.id: problem for problem in self.benchmark.items}
        return [
            EvalSample(
                problem=problems[row["problem_id"]],
                sample=row["sample"],
                version=row["version"],
                text=row["completion"],
                tokens=np.array(row["tokens"], np.int32),
                logprobs=np.array([value for value in row["logprobs"] if value is not None], np.float64),
                finish_reason=row["finish_reason"],
                grade=Grade(row["reward"], row["verdict"], "", row.get("parts", {}), row.get("notes", {})),
                loss_mask=np.array(row["loss_mask"], bool) if "loss_mask" in row else None,
            )
            for row in metrics.read(self.path)
            if row["problem_id"] in problems and self.version in (None, row["version"])
        ]

    def add(self, samples: Sequence[EvalSample]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(item_line(0, s.version, self.benchmark.name, s)) + "\n" for s in samples]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def timeless(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in values.items() if k != "wall_s"} for name, values in found.items()}


def write_csv(path: Path, document: dict[str, Any]) -> None:
    """Every figure of `results.json`, one row a benchmark; `pass_at_3` is pass@3, `greedy_avg` the greedy share."""
    rows = []
    for name, values in document["results"].items():
        row: dict[str, Any] = {"benchmark": name}
        for key, value in values.items():
            if isinstance(value, dict):
                row |= {f"{key}_{k}": share for k, share in value.items()}
            else:
                row[key] = value
        greedy = document.get("greedy", {}).get(name)
        rows.append(row | ({"greedy_avg": greedy["avg_at_n"]} if greedy else {}))
    columns = list(dict.fromkeys(k for row in rows for k in row))
    _write_rows(path, columns, rows)


def partial_of(folder: Path, step: int) -> Path:
    """Where the samples of a run's unfinished evaluation are kept."""
    return folder / "partial" / f"step_{step:06d}"


def write_results(folder: Path, when: Evaluation, results: Sequence[Result], greedy: Sequence[Result] = ()) -> None:
    """Items and table of one evaluation. Writing a step again replaces it. `greedy`: of the same benchmarks."""
    for place, found in ((folder, results), (folder / GREEDY, greedy)):
        for result in found:
            lines = [json.dumps(item_line(when.step, when.version, result.benchmark, each)) for each in result.samples]
            file = place / "items" / f"step_{when.step:06d}_{result.benchmark}.jsonl"
            write_atomic(file, "\n".join(lines) + "\n", sync=True)
    update_csv(folder / "eval.csv", when, results, greedy)


def forget_after(folder: Path, step: int) -> None:
    """A run goes on from a checkpoint of `step`: later steps' evaluations, finished or not, are of other weights."""
    if (folder / "eval.csv").exists():
        kept = [row for row in tables.read(folder / "eval.csv") if int(row["step"]) <= step]
        _write_rows(folder / "eval.csv", (*CSV_COLUMNS, *SHARES), kept)
    places = (folder / "items", folder / GREEDY / "items", folder / "partial")
    for path in [path for place in places for path in place.glob("step_*")]:
        if int(path.name.split("_")[1].removesuffix(".jsonl")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def forget_unfinished(folder: Path) -> None:
    """Evaluations go on with other settings: answers that were drawn under the old ones are asked for again."""
    shutil.rmtree(folder / "partial", ignore_errors=True)


def item_line(step: int, version: int, benchmark: str, sample: EvalSample) -> dict[str, Any]:
    """One line of an items file."""
    return sample_line(
        step=step,
        version=version,
        benchmark=benchmark,
        problem_id=sample.problem.id,
        problem=sample.problem.question,
        answer=sample.problem.answer,
        sample=sample.sample,
        completion=sample.text,
        tokens=sample.tokens,
        logprobs=sample.logprobs,
        advantage=None,
        reward=sample.grade.reward,
        verdict=sample.grade.verdict,
        parts=sample.grade.parts,
        notes=sample.grade.notes,
        finish_reason=sample.finish_reason,
        loss_mask=sample.loss_mask,
    )


def update_csv(path: Path, when: Evaluation, results: Sequence[Result], greedy: Sequence[Result] = ()) -> None:
    """Put one evaluation's rows into the table, in the order of steps; rows of the same step make room."""
    rows = [row for row in tables.read(path) if int(row["step"]) != when.step] if path.exists() else []
    scores = [(result.benchmark, result.grader, result.score) for result in results]
    if scores:
        scores.append((metrics.OVERALL, common_grader(results), passk.overall([score for *_, score in scores])))
    found = shares(results, greedy)
    for name, grader, score in scores:
        of = {"step": when.step, "version": when.version, "due_step": when.due_step}
        rows.append({**of, "benchmark": name, "grader": grader, **score_figures(score), **found[name]})
    _write_rows(path, (*CSV_COLUMNS, *SHARES), sorted(rows, key=lambda row: int(row["step"])))


def shares(results: Sequence[Result], greedy: Sequence[Result]) -> dict[str, dict[str, float]]:
    """{benchmark: `SHARES`}, those that there are, and `overall`: their unweighted means."""
    found: dict[str, dict[str, float]] = {each.benchmark: {"no_answer": each.no_answer_fraction} for each in results}
    for each in greedy:
        found[each.benchmark] |= {"greedy": each.score.avg_at_n, "greedy_no_answer": each.no_answer_fraction}
    if found:
        names = next(iter(found.values()))
        found[metrics.OVERALL] = {name: fmean(values[name] for values in found.values()) for name in names}
    return found


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(path, tables.text_of(columns, rows), sync=True)


def common_grader(results: Sequence[Result]) -> str:
    """Beside the mean over benchmarks: what judged all of them, or `several`."""
    graders = {result.grader for result in results}
    return graders.pop() if len(graders) == 1 else "several"


def figures(results: Sequence[Result], greedy: Sequence[Result] = ()) -> dict[str, dict[str, Any]]:
    """{benchmark: figures} and `overall`; with `greedy` also `greedy_avg` and `greedy_no_answer_fraction`."""
    found = {result.benchmark: result.figures() for result in results}
    if results:
        overall = full_figures(passk.overall([result.score for result in results]))
        found[metrics.OVERALL] = {"grader": common_grader(results)} | overall
    for name, values in shares(results, greedy).items() if greedy else ():
        found[name] |= {"greedy_avg": values["greedy"], "greedy_no_answer_fraction": values["greedy_no_answer"]}
    return found


def metric_records(process: str, when: Evaluation, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One metrics record a benchmark and one for `overall`, from `figures`; every figure is named eval_*, without those
    by k."""
    return [
        {"step": when.step, "process": process, "version": when.version, "due_step": when.due_step, "benchmark": name}
        | {k if k == "grader" else f"eval_{k}": value for k, value in values.items() if not isinstance(value, dict)}
        for name, values in found.items()
    ]
