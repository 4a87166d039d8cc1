"""The evaluation process: benchmarks at the versions the hub pins, or once, on an engine of its own.

In a run it asks the hub for the next evaluation, samples every benchmark from the pinned engine and writes

    RUN_DIR/eval/items/step_000010_BENCHMARK.jsonl     one line a sample, the same schema as rollout samples
    RUN_DIR/eval/eval.csv                              one row a benchmark and an `overall` row, fractions

With `extra = {"standalone": true, "out": DIR}` it evaluates the first engine once, writes the same files and
`results.json` below DIR, and ends. Further keys there: `weights_version` (what must answer; default any), `step`,
`greedy` (true: one greedy sample an item besides).
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import stop_token_ids
from astracli.rl import passk
from astracli.rl.evaluation import EvalSample, Result, Sampling, evaluate_benchmark, score_figures
from astracli.rl.reward import GradePool
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

    async def evaluate(self, engine_name: str, version: int | None, *, greedy: bool = False) -> list[Result]:
        """Every benchmark of the recipe, one after the other, on one engine."""
        from astracli.engines.client import EngineClient

        table = self.config.recipe.eval
        (url,) = [engine["url"] for engine in self.config.engines if engine["name"] == engine_name]
        client = EngineClient(url, self.config.token)
        sampling = replace(self.sampling, temperature=0.0) if greedy else self.sampling
        results = []
        try:
            await client.wait_ready(self.config.recipe.launch.ready_timeout_s)
            for benchmark in self.benchmarks:
                self.reporter.progress(benchmark=benchmark.name)
                results.append(
                    await evaluate_benchmark(
                        client,
                        benchmark,
                        self.tokenizer,
                        self.pool,
                        sampling=sampling,
                        samples=1 if greedy else table.samples,
                        version=version,
                        pass_k=table.pass_k,
                        max_concurrency=table.max_concurrency,
                        fixed_calls=self.config.recipe.launch.deterministic,
                        on_progress=lambda done, total: self.reporter.progress(done=done, total=total),
                    )
                )
        finally:
            await client.close()
        return results


def run(config: WorkerConfig, reporter: Reporter) -> None:
    from transformers import AutoTokenizer

    recipe = config.recipe
    tokenizer = AutoTokenizer.from_pretrained(str(config.model_path))
    sampling = Sampling(
        temperature=recipe.eval.temperature,
        top_p=recipe.eval.top_p,
        max_new_tokens=recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens,
        context_length=recipe.rollout.context_length,
        stop_token_ids=tuple(stop_token_ids(tokenizer, config.model_path)),
        seed=recipe.seed,
    )
    sets = [benchmarks.load(name, config.benchmark_path(name)) for name in recipe.eval.benchmarks]
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
    """The standalone mode: first engine, one evaluation, files below `extra["out"]`."""
    config, extra = evaluator.config, evaluator.config.extra
    out, engine = Path(extra["out"]), config.engines[0]["name"]
    expected = extra.get("weights_version")
    stop = evaluator.reporter.stop_requested
    results = _until_stop(evaluator.evaluate(engine, expected), stop)
    step = int(extra.get("step", 0))
    version = expected if expected is not None else next((s.version for r in results for s in r.samples), 0)
    write_results(out, step, version, results)
    document: dict[str, Any] = {"step": step, "version": version, "results": figures(results)}
    if extra.get("greedy"):
        document["greedy"] = figures(_until_stop(evaluator.evaluate(engine, expected, greedy=True), stop))
    _write_atomically(out / "results.json", json.dumps(document, indent=2) + "\n")


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


def figures(results: Sequence[Result]) -> dict[str, dict[str, float | int]]:
    """{benchmark: figures} and `overall`."""
    found = {result.benchmark: result.figures() for result in results}
    if results:
        found[OVERALL] = score_figures(passk.overall([result.score for result in results]))
    return found


def metric_records(process: str, step: int, version: int, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One metrics record a benchmark and one for `overall`; every figure is named eval_*."""
    return [
        {"step": step, "process": process, "version": version, "benchmark": name}
        | {f"eval_{key}": value for key, value in values.items()}
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
