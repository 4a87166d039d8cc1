"""The evaluation process: benchmarks at the versions the hub pins, or once, on an engine of its own.

In a run it asks the hub for the next evaluation, samples every benchmark from the pinned engine and writes

    RUN_DIR/eval/items/step_000010_BENCHMARK.jsonl     one line a sample, the same schema as rollout samples
    RUN_DIR/eval/eval.csv                              one row a benchmark and an `overall` row, fractions

With `extra = {"standalone": true, "out": DIR}` it evaluates once, spread over all engines, writes the same files and
`results.json` and `results.csv` below DIR, and ends. Further keys there: `weights_version` (what must answer; default
any), `step`, `greedy` (true: one greedy sample an item besides). Samples are kept in `DIR/partial/` as they come: a
second attempt asks for the missing ones only, and ends with the same files as one that was never interrupted. The files
themselves are `eval_files`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from astracli.adapter import load_tokenizer
from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import stop_token_ids
from astracli.rl.evaluation import Result, Sampling, Spread, evaluate_benchmark
from astracli.rl.reward import GradePool
from astracli.workers import eval_files
from astracli.workers.common import TERM_EXIT, Reporter, WorkerConfig, worker_main


@dataclass
class Evaluator:
    """What stays the same from one evaluation to the next."""

    config: WorkerConfig
    reporter: Reporter
    tokenizer: Any
    pools: Mapping[str, GradePool]
    """By the reward that a benchmark is judged by."""
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
                kept = eval_files.Partial(partial, benchmark, version) if partial is not None else None
                results.append(
                    await evaluate_benchmark(
                        clients[0] if len(clients) == 1 else Spread(clients),
                        benchmark,
                        self.tokenizer,
                        self.pools[benchmark.grader],
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
    data = recipe.data
    with contextlib.ExitStack() as stack:
        pools = {
            spec: stack.enter_context(
                GradePool(spec, data.reward_workers, data.reward_timeout_s, data.grading.model_dump())
            )
            for spec in sorted({benchmark.grader for benchmark in sets})
        }
        evaluator = Evaluator(config, reporter, tokenizer, pools, sampling, sets)
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
            eval_files.write_results(config.run_dir / "eval", step, version, results)
            hub.metrics(eval_files.metric_records(config.name, step, version, results))
            hub.eval_done(step, version, eval_files.figures(results))


def evaluate_once(evaluator: Evaluator) -> None:
    """The standalone mode: one evaluation, files below `extra["out"]`, which hold nothing that differs between runs."""
    config, extra = evaluator.config, evaluator.config.extra
    out = Path(extra["out"])
    expected = extra.get("weights_version")
    stop = evaluator.reporter.stop_requested
    results = _until_stop(evaluator.evaluate(None, expected, partial=out / "partial"), stop)
    step = int(extra.get("step", 0))
    version = expected if expected is not None else next((s.version for r in results for s in r.samples), 0)
    eval_files.write_results(out, step, version, results)
    document: dict[str, Any] = {
        "step": step,
        "version": version,
        "seed": config.recipe.seed,
        "temperature": config.recipe.eval.temperature,
        "results": eval_files.timeless(eval_files.figures(results)),
    }
    if extra.get("greedy"):
        work = evaluator.evaluate(None, expected, greedy=True, partial=out / "partial" / "greedy")
        document["greedy"] = eval_files.timeless(eval_files.figures(_until_stop(work, stop)))
    eval_files.write_csv(out / "results.csv", document)
    eval_files.write_atomically(out / "results.json", json.dumps(document, indent=2) + "\n")
    shutil.rmtree(out / "partial", ignore_errors=True)


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


if __name__ == "__main__":
    worker_main(run)
