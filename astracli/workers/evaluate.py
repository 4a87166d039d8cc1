"""The evaluation process: benchmarks at the versions the hub pins, or once, on an engine of its own.

In a run it asks the hub for the next evaluation, samples every benchmark from the pinned engine and writes

    RUN_DIR/eval/items/step_000010_BENCHMARK.jsonl     one line a sample, the same schema as rollout samples
    RUN_DIR/eval/eval.csv                              one row a benchmark and an `overall` row, fractions

With `extra = {"standalone": true, "out": DIR}` it evaluates once, spread over all engines, writes the same files and
`results.json` and `results.csv` below DIR, and ends. Further keys there: `weights_version` (what must answer; default
any), `step`, `greedy` (true: one greedy sample an item besides). Samples are kept in `DIR/partial/` as they come: a
second attempt asks for the missing ones only, and ends with the same files as one that was never interrupted.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from astracli import metrics
from astracli.adapter import load_tokenizer
from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import stop_token_ids
from astracli.rl import passk
from astracli.rl.evaluation import (
    EvalSample,
    Result,
    Sampling,
    Spread,
    evaluate_benchmark,
    full_figures,
    score_figures,
)
from astracli.rl.reward import Grade, GradePool
from astracli.rl.sample_log import sample_line
from astracli.workers.common import TERM_EXIT, Reporter, WorkerConfig, worker_main

CSV_COLUMNS = ("step", "version", "benchmark", "items", "n", "avg_at_n", "stderr", "k", "pass_at_k")
OVERALL = "overall"


@dataclass
class Evaluator:
    """What stays the same from one evaluation to the next."""

    config: WorkerConfig
    reporter: Reporter
    tokenizer: Any
    pool: GradePool
    sampling: Sampling
    benchmarks: list[Benchmark]

    @property
    def embedded(self) -> bool:
        """Whether our own engine answers, which takes one call at a time in the deterministic mode."""
        return self.config.backends.get("engine", "embedded") == "embedded"

    async def evaluate(
        self, engine_name: str | None, version: int | None, *, greedy: bool = False, partial: Path | None = None
    ) -> list[Result]:
        """Every benchmark of the recipe, one after the other, on one engine; None spreads them over all.

        With `partial`, a directory, samples are kept there as they come, and those that are there are not asked again.
        """
        from astracli.engines.client import EngineClient

        table = self.config.recipe.eval
        clients = [
            EngineClient(
                engine["url"],
                self.config.token,
                name=engine["name"],
                loader_dir=None if self.embedded else Path(engine["stage_dir"]),
            )
            for engine in self.config.engines
            if engine_name in (None, engine["name"])
        ]
        sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
        results = []
        try:
            for client in clients:
                await client.wait_ready(self.config.recipe.launch.ready_timeout_s)
            for benchmark in self.benchmarks:
                self.reporter.progress(benchmark=benchmark.name)
                kept = Partial(partial, benchmark, version) if partial is not None else None
                results.append(
                    await evaluate_benchmark(
                        clients[0] if len(clients) == 1 else Spread(clients),
                        benchmark,
                        self.tokenizer,
                        self.pool,
                        sampling=sampling,
                        samples=1 if greedy else table.samples,
                        version=version,
                        pass_k=table.pass_k,
                        max_concurrency=table.max_concurrency,
                        on_progress=lambda done, total: self.reporter.progress(done=done, total=total),
                        done_before=kept.read() if kept else (),
                        on_samples=kept.add if kept else None,
                        whole_calls=self.config.recipe.launch.deterministic and self.embedded,
                    )
                )
        finally:
            for client in clients:
                await client.close()
        return results


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
                logprobs=np.array(row["logprobs"], np.float64),
                finish_reason=row["finish_reason"],
                grade=Grade(row["reward"], row["verdict"]),
            )
            for row in metrics.read(self.path)
            if row["problem_id"] in problems and self.version in (None, row["version"])
        ]

    def add(self, samples: Sequence[EvalSample]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(item_line(0, s.version, self.benchmark.name, s)) + "\n" for s in samples]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def run(config: WorkerConfig, reporter: Reporter) -> None:
    recipe = config.recipe
    tokenizer = load_tokenizer(config.model_path)
    sampling = Sampling(
        temperature=recipe.eval.temperature,
        top_p=recipe.eval.top_p,
        max_new_tokens=recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens,
        context_length=recipe.rollout.context_length,
        stop_token_ids=tuple(stop_token_ids(tokenizer, config.model_path)),
        seed=recipe.seed,
    )
    sets = [benchmarks.load(name, config.benchmark_path(name), recipe.data.prompt) for name in recipe.eval.benchmarks]
    with GradePool("math", recipe.data.reward_workers, recipe.data.reward_timeout_s) as pool:
        evaluator = Evaluator(config, reporter, tokenizer, pool, sampling, sets)
        reporter.ready()
        if config.extra.get("standalone"):
            evaluate_once(evaluator)
        else:
            follow_hub(evaluator)


def follow_hub(evaluator: Evaluator) -> None:
    """Evaluate what the hub hands out until it says stop. An evaluation counts as done when its files are written."""
    from astracli.hub.client import HubClient

    config, reporter = evaluator.config, evaluator.reporter
    with HubClient(config.hub_url, config.token) as hub:
        while not reporter.stop_requested.is_set():
            task = hub.eval_next(wait_s=5.0)
            if "step" not in task:
                if task.get("stop"):
                    return
                reporter.waiting(task.get("wait"))
                continue
            reporter.waiting(None)
            step, version = int(task["step"]), int(task["version"])
            reporter.progress(step=step, version=version)
            results = _until_stop(evaluator.evaluate(task["engine"], version), reporter.stop_requested)
            write_results(config.run_dir / "eval", step, version, results)
            hub.metrics(metric_records(config.name, step, version, results))
            hub.eval_done(step, version, figures(results))


def evaluate_once(evaluator: Evaluator) -> None:
    """The standalone mode: one evaluation, files below `extra["out"]`, which hold nothing that differs between runs."""
    config, extra = evaluator.config, evaluator.config.extra
    out = Path(extra["out"])
    expected = extra.get("weights_version")
    stop = evaluator.reporter.stop_requested
    results = _until_stop(evaluator.evaluate(None, expected, partial=out / "partial"), stop)
    step = int(extra.get("step", 0))
    version = expected if expected is not None else next((s.version for r in results for s in r.samples), 0)
    write_results(out, step, version, results)
    document: dict[str, Any] = {
        "step": step,
        "version": version,
        "seed": config.recipe.seed,
        "temperature": config.recipe.eval.temperature,
        "results": _timeless(figures(results)),
    }
    if extra.get("greedy"):
        work = evaluator.evaluate(None, expected, greedy=True, partial=out / "partial" / "greedy")
        document["greedy"] = _timeless(figures(_until_stop(work, stop)))
    write_csv(out / "results.csv", document)
    _write_atomically(out / "results.json", json.dumps(document, indent=2) + "\n")
    shutil.rmtree(out / "partial", ignore_errors=True)


def _timeless(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
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
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    _write_atomically(path, text.getvalue())


def write_results(folder: Path, step: int, version: int, results: Sequence[Result]) -> None:
    """Items and table of one evaluation. Writing a step again replaces it."""
    for result in results:
        lines = [json.dumps(item_line(step, version, result.benchmark, sample)) for sample in result.samples]
        _write_atomically(folder / "items" / f"step_{step:06d}_{result.benchmark}.jsonl", "\n".join(lines) + "\n")
    update_csv(folder / "eval.csv", step, version, results)


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
        finish_reason=sample.finish_reason,
    )


def update_csv(path: Path, step: int, version: int, results: Sequence[Result]) -> None:
    """Put one evaluation's rows into the table, in the order of steps; rows of the same step make room."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) != step]
    scores = [(result.benchmark, result.score) for result in results]
    if scores:
        scores.append((OVERALL, passk.overall([score for _, score in scores])))
    for name, score in scores:
        numbers = {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in score_figures(score).items()}
        rows.append({"step": step, "version": version, "benchmark": name, **numbers})
    rows.sort(key=lambda row: int(row["step"]))
    text = io.StringIO()
    table = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _write_atomically(path, text.getvalue())


def figures(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """{benchmark: figures} and `overall`."""
    found = {result.benchmark: result.figures() for result in results}
    if results:
        found[OVERALL] = full_figures(passk.overall([result.score for result in results]))
    return found


def metric_records(process: str, step: int, version: int, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One metrics record a benchmark and one for `overall`; every figure is named eval_*, those by k are left out."""
    return [
        {"step": step, "process": process, "version": version, "benchmark": name}
        | {f"eval_{key}": value for key, value in values.items() if not isinstance(value, dict)}
        for name, values in figures(results).items()
    ]


def _until_stop(work: Coroutine[Any, Any, list[Result]], stop: threading.Event) -> list[Result]:
    """Run to the end, or leave with the exit code of a stopped worker as soon as a stop is asked for."""

    async def watch() -> list[Result]:
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.wait({task}, timeout=0.2)
            if stop.is_set() and not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=2.0)
                raise SystemExit(TERM_EXIT)
        return task.result()

    return asyncio.run(watch())


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    worker_main(run)
