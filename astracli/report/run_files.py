"""What the files of a run say: its row in a list, its newest figures, its logs, samples and summary."""

from __future__ import annotations

import io
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from astracli.config import reading
from astracli.errors import UserError
from astracli.runs import changes, documents, metrics, names
from astracli.runs.run_dir import JOB_LOG, RunDir, paths

Outcome = Literal["right", "wrong", "truncated"]

REPORTED = (
    names.REWARD, "reward_mean", "step_s", "tokens_per_s", "staleness_mean", "parity_mean_abs", "ratio_mean",
    "clip_fraction", "entropy", "grad_norm", "delta_density", "delta_bytes", "full_bytes", "pause_s",
)  # fmt: skip
"""Metrics that a report shows, in its order; those that a run never wrote are left out."""


def row(run: RunDir) -> dict[str, Any]:
    """One line of `astra runs list`. A damaged `status.json` is said, not raised."""
    try:
        status = run.status()
        state = run.shown_state()
    except UserError:
        status, state = None, f"unknown: {run.status_json.name} is damaged"
    end = status and (status.ended or (time.time() if status.alive() else None))
    return {
        "run": run.name,
        "state": state,
        "recipe": status.recipe if status else None,
        "step": status.step if status else None,
        "steps": status.steps if status else None,
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started)) if status else None,
        "wall_s": round(end - status.started, 1) if status and end else None,
        "path": str(run.path),
        "from": origin(run),
        "changes": [changes.words(line) for line in changes.read(run)],
    }


def origin(run: RunDir) -> str | None:
    """The run whose weights a run started from, in words; None for one that started from a model."""
    try:
        found = reading.document(run.path / "from.json")
        return f"{found['run']}, step {found['step']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_figures(run: RunDir) -> dict[str, dict[str, Any]]:
    """The last record that each process wrote to `metrics.jsonl`: {process: {step, figure: value, ...}}."""
    last: dict[str, dict[str, Any]] = {}
    for record in metrics.read(run.metrics_jsonl):
        process = str(record.get("process", "run"))
        last[process] = last.get(process, {}) | {k: v for k, v in record.items() if k not in ("time", "process")}
    return last


def log_files(run: RunDir, name: str | None = None) -> list[Path]:
    """Logs of the newest attempt, all or the one called `name`. Raises UserError."""
    attempts = run.attempts()
    files = sorted(run.attempt_logs(attempts[-1]).glob("*.log")) if attempts else []
    files += [file for file in [run.logs / JOB_LOG] if file.is_file()]
    if not files:
        raise UserError(f"run `{run.path}` has no logs")
    if name is None:
        return files
    found = [file for file in files if file.stem == name]
    if not found:
        raise UserError(
            f"run `{run.path}` has no log `{name}`", f"there are: {', '.join(f.stem for f in files) or 'none'}"
        )
    return found


def last_lines(file: Path, count: int) -> list[str]:
    """The last `count` lines of a text file."""
    with io.TextIOWrapper(reading.opened(file), encoding="utf-8", errors="replace") as lines:
        return [line.rstrip("\n") for line in deque(lines, maxlen=count)]


def follow(files: list[Path], going: Callable[[], bool], interval_s: float = 0.2) -> Iterator[tuple[Path, str]]:
    """(file, line) for every line written from now on, until `going` says no and everything is read."""
    offsets = {file: file.stat().st_size for file in files}
    while True:
        more = going()
        for file in files:
            with reading.opened(file) as stream:
                stream.seek(offsets[file])
                content = stream.read()
            whole = content if not more else content[: content.rfind(b"\n") + 1]
            offsets[file] += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                yield file, line
        if not more:
            return
        time.sleep(interval_s)


def samples(source: RunDir | Path, *, outcomes: set[Outcome], step: int | None = None) -> Iterator[dict[str, Any]]:
    """Rollout samples in the order of writing, of a run or of a file of `astra rollout`; `outcomes` empty = all, else
    those that match any of them.

    Where a run has none (a directory of `astra eval`), the answers to its benchmarks.
    """
    if isinstance(source, Path):
        files = [source]
    else:
        files = sorted(source.samples.glob("*.jsonl")) or sorted((source.eval / "items").glob("*.jsonl"))
    for file in files:
        for sample in metrics.read(file):
            if step is not None and sample.get("step") != step:
                continue
            if not outcomes or outcomes & _outcomes(sample):
                yield sample


def _outcomes(sample: dict[str, Any]) -> set[Outcome]:
    found: set[Outcome] = {"right" if sample.get("verdict") == "right" else "wrong"}
    return found | {"truncated"} if sample.get("finish_reason") == "length" else found


@dataclass(frozen=True)
class Trend:
    """One benchmark at the first and the last evaluated step; fractions."""

    benchmark: str
    n: int
    first_step: int
    first: float
    last_step: int
    last: float
    stderr: float
    k: int
    pass_first: float
    pass_last: float
    grader: str
    """What judged the answers; "" in runs of earlier versions."""

    @property
    def difference(self) -> float:
        return self.last - self.first


def eval_rows(run: RunDir) -> dict[str, list[dict[str, str]]]:
    """benchmark -> its rows of `eval/eval.csv` in the order of steps; empty without that file."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    if run.eval_csv.is_file():
        for row in sorted(documents.evaluations(run.eval_csv), key=lambda row: int(row["step"])):
            found[row["benchmark"]].append(row)
    return found


def trends(run: RunDir) -> list[Trend]:
    """First and last evaluation of every benchmark."""
    found = []
    for benchmark, rows in eval_rows(run).items():
        a, b = rows[0], rows[-1]
        found.append(
            Trend(
                benchmark, int(b["n"]), int(a["step"]), float(a["avg_at_n"]), int(b["step"]), float(b["avg_at_n"]),
                float(b["stderr"]), int(b["k"]), float(a["pass_at_k"]), float(b["pass_at_k"]),
                b.get("grader") or "",
            )
        )  # fmt: skip
    return found


def results(run: RunDir) -> dict[str, Any] | None:
    """`eval/results.json`, which an `astra eval` leaves; None for anything else."""
    file = run.eval / "results.json"
    return documents.document(file) if file.is_file() else None


def summary(run: RunDir) -> dict[str, Any] | None:
    """The summary figures of a run that has ended; None while it runs and of one that was killed. Its places are where
    the run lies now: it may have been moved, or be looked at from another directory."""
    try:
        document = documents.document(run.summary_json)
    except FileNotFoundError:
        return None
    return document | {"paths": paths(run.path)}


def report(run: RunDir) -> dict[str, Any]:
    """The summary figures of a run: state, evaluation trend, means over the last tenth of the steps, expected."""
    records = [metrics.without_absent(record) for record in metrics.read(run.metrics_jsonl)]
    figures = []
    for name in REPORTED:
        series = metrics.series(records, name)
        if series:
            tail = [value for _, value in series[-max(1, len(series) // 10) :]]
            words = ", ".join(filter(None, [names.words(name), names.FIGURES[name].unit]))
            figures.append({"figure": words, "metric": name, "first": series[0][1], "last_tenth": metrics.mean(tail)})
    recipe = documents.document(run.recipe_json)
    evaluation = [vars(trend) | {"difference": trend.difference} for trend in trends(run)]
    return {"run": row(run), "evaluation": evaluation, "figures": figures, "expected": recipe.get("expected")}
