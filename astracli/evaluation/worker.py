"""The evaluation process: benchmarks at the versions that the hub names, or once, on engines of its own.

In a run it asks the hub for the next evaluation, samples every benchmark from all engines as they come to hold that
version (`evaluation/spread.py`), tells the hub when an engine has served its share, and writes

    RUN_DIR/eval/items/step_000010_BENCHMARK.jsonl     one line a sample, the same schema as rollout samples
    RUN_DIR/eval/eval.csv                              one row a benchmark and an `overall` row, fractions

With `config.out` it evaluates once, also one greedy sample an item, writes the same files and `results.json` and
`results.csv` there, and ends. Samples are kept as they come, in `RUN_DIR/eval/partial/STEP/` and
in `DIR/partial/`: a second attempt asks for the missing ones only, and ends with the same files as one that was never
interrupted. What is in these files: `files`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import stop_token_ids
from astracli.engines import registry as engines
from astracli.engines.stops import StopStrings
from astracli.envs import registry
from astracli.envs.attempt import Failure
from astracli.envs.contract import Env, EnvSetup
from astracli.envs.prompt_tokens import PromptTokens
from astracli.envs.time_limit import LoopWatch
from astracli.errors import RunFailed
from astracli.evaluation import files as eval_files
from astracli.evaluation.benchmark import BenchmarkWork, EvalSampling, Result
from astracli.evaluation.episodes import EpisodeWork
from astracli.evaluation.run_engines import WAIT_S, RunEngines
from astracli.evaluation.spread import evaluate
from astracli.hub.client import AsyncHubClient, HubClient
from astracli.hub.types import Evaluation, NextEvaluation
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat
from astracli.process.atomic import write_atomic
from astracli.process.config import EvalConfig
from astracli.process.worker import TERM_EXIT, Reporter, worker_main
from astracli.rewards.reward import GradePool, Rewards, open_pools


@dataclass
class Evaluator:
    """What stays the same from one evaluation to the next."""

    config: EvalConfig
    reporter: Reporter
    tokenizer: Any
    pools: Mapping[str, GradePool]
    """By benchmark."""
    sampling: EvalSampling
    benchmarks: list[Benchmark]
    envs: Mapping[str, Env] = field(default_factory=dict)
    """By benchmark: the environment that plays its samples; none where a sample is one completion."""

    def __post_init__(self) -> None:
        self._shown: set[tuple[str, str, int]] = set()

    async def evaluate(self, partial: Path, *, greedy: bool = False, of_run: Evaluation | None = None) -> list[Result]:
        """Every benchmark of the recipe, over all engines: a run's as they hold the version, others once they are up.

        Samples are kept in the directory `partial` as they come, and those that are there are not asked again. With
        `eval.greedy` a run's come with one greedy sample an item: a second result of each benchmark, behind all others.
        """
        launch, version = self.config.recipe.launch, of_run.version if of_run is not None else None
        engine = engines.get(self.config.engine)
        whole = launch.deterministic and engine.whole_calls
        works = [self._work(benchmark, version, partial, greedy, whole) for benchmark in self.benchmarks]
        if of_run is not None and self.config.recipe.eval.greedy:
            works += [self._work(each, version, partial / "greedy", True, whole) for each in self.benchmarks]
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(self.config.hub_url, self.config.token))
            clients = {}
            for entry in self.config.engines:
                made = engine.client(
                    entry.url, entry.token or self.config.token, name=entry.name, stage_dir=entry.stage_dir
                )
                client = clients[entry.name] = await stack.enter_async_context(made)
                if of_run is None:
                    await client.wait_ready(launch.ready_timeout_s)
            if self.envs:
                stack.enter_context(LoopWatch(self.config.recipe.rollout.env_timeout_s))
            return await evaluate(
                works,
                clients,
                RunEngines(hub, of_run.step, of_run.version) if of_run is not None else None,
                max_concurrency=self.config.recipe.evaluation_requests,
                refill=self.config.recipe.rollout.refill,
                fixed=whole,
                on_progress=self._tell,
                on_waiting=lambda waits: self.reporter.waiting(
                    f"an engine that holds version {version}" if waits else None
                ),
            )

    def _work(
        self, benchmark: Benchmark, version: int | None, partial: Path, greedy: bool, whole: bool
    ) -> BenchmarkWork:
        table, kept = self.config.recipe.eval, eval_files.Partial(partial, benchmark, version)
        env = self.envs.get(benchmark.name)
        kind = BenchmarkWork if env is None else partial_of(EpisodeWork, env=env, on_failure=self._show)
        return kind(
            benchmark,
            self.tokenizer,
            self.pools[benchmark.name],
            sampling=replace(self.sampling, temperature=0.0) if greedy else self.sampling,
            samples=1 if greedy else table.samples_of(benchmark.name, benchmark.samples),
            version=version,
            pass_k=table.pass_k,
            max_concurrency=self.config.recipe.evaluation_requests,
            whole_calls=whole,
            done_before=kept.read(),
            on_samples=kept.add,
        )

    def _show(self, failure: Failure) -> None:
        """Each kind of failure once, with its traceback."""
        if failure.place not in self._shown:
            self._shown.add(failure.place)
            name = self.config.recipe.evaluation_env
            self.reporter.warn(f"environment {name}: an episode failed and counts as wrong\n{failure.text}")

    def check_whole(self, when: Evaluation, partial: Path) -> None:
        """Raises RunFailed when samples of an evaluation are gone that no engine can be asked for again."""
        for benchmark in self.benchmarks:
            works = [self._work(benchmark, when.version, partial, False, False)]
            if self.config.recipe.eval.greedy:
                works.append(self._work(benchmark, when.version, partial / "greedy", True, False))
            for work in works:
                if work.done < work.total:
                    there = f"{work.done} of {work.total} samples of {benchmark.name}"
                    raise RunFailed(
                        f"`{partial}` holds {there}, and the engines have gone on from version {when.version}",
                        f"a resume evaluates them again: `astra train --resume {self.config.run_dir}`",
                    )

    def _tell(self, work: BenchmarkWork) -> None:
        self.reporter.progress(benchmark=work.benchmark.name, done=work.done, total=work.total)


def run(config: EvalConfig, reporter: Reporter) -> None:
    recipe = config.recipe
    tokenizer = load_tokenizer(config.model_path)
    sampling = EvalSampling(
        temperature=recipe.eval.temperature,
        top_p=recipe.eval.top_p,
        max_new_tokens=recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens,
        context_length=recipe.rollout.context_length,
        stop_token_ids=tuple(stop_token_ids(tokenizer, config.model_path)),
        seed=recipe.seed,
        stop=StopStrings(tuple(recipe.rollout.stop), tokenizer) if recipe.rollout.stop else None,
        chat=ChatFormat.of(recipe),
    )
    sets = [benchmarks.load(name, config.benchmarks[name], recipe=recipe) for name in recipe.eval.benchmarks]
    rewards = {
        benchmark.name: Rewards.of(
            benchmark.data,
            max_errors=recipe.most_reward_errors,
            on_error=lambda words: reporter.warn(f"the first error of a reward:\n{words}"),
            on_excess=reporter.warn,
        )
        if benchmark.data is not None
        else Rewards.of(recipe.data.by(benchmark.grader))
        for benchmark in sets
    }
    with contextlib.ExitStack() as stack:
        pools = open_pools(stack, rewards)
        found = environments(recipe, tokenizer, pools) if recipe.evaluation_env != registry.BUILT_IN else {}
        for env in found.values():
            stack.callback(env.close)
        evaluator = Evaluator(config, reporter, tokenizer, pools, sampling, sets, found)
        reporter.ready()
        if config.out is not None:
            evaluate_once(evaluator, config.out)
        else:
            follow_hub(evaluator)


def environments(recipe: Recipe, tokenizer: Any, pools: Mapping[str, GradePool]) -> dict[str, Env]:
    """The environment of each benchmark, with its rewards, and with a recipe in which rollouts have the lengths of
    evaluations."""
    rollout = recipe.rollout.model_copy(
        update={"max_new_tokens": recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens}
    )
    data = recipe.data.model_copy(update={"max_prompt_tokens": recipe.rollout.context_length})
    changed, kind = recipe.model_copy(update={"rollout": rollout, "data": data}), registry.find(recipe.evaluation_env)

    def made(pool: GradePool) -> Env:
        return kind(EnvSetup(changed, tokenizer, lambda problem: pool, PromptTokens(tokenizer, ChatFormat.of(recipe))))

    return {name: made(pool) for name, pool in pools.items()}


def follow_hub(evaluator: Evaluator) -> None:
    """Evaluate what the hub hands out until it says stop. Results are written while the next evaluation runs."""
    config, reporter = evaluator.config, evaluator.reporter
    folder = config.run_dir / "eval"
    finishing: dict[int, Future[None]] = {}
    writer = ThreadPoolExecutor(1, "results")
    with HubClient(config.hub_url, config.token) as hub:
        while not reporter.stop_requested.is_set():
            for version in [version for version, writing in finishing.items() if writing.done()]:
                finishing.pop(version).result()
            reply: NextEvaluation = hub.eval_next(wait_s=WAIT_S, finishing=list(finishing))
            when = reply.evaluation
            if when is None:
                if reply.stop:
                    break
                reporter.waiting(reply.wait)
                continue
            reporter.waiting(None)
            reporter.progress(step=when.step, version=when.version)
            partial = eval_files.partial_of(folder, when.step)
            if when.served:
                evaluator.check_whole(when, partial)
            results = _until_stop(evaluator.evaluate(partial, of_run=when), reporter.stop_requested)
            finishing[when.version] = writer.submit(finish, config, hub, when, results)
        for writing in finishing.values():
            writing.result()
        writer.shutdown()


def finish(config: EvalConfig, hub: HubClient, when: Evaluation, results: Sequence[Result]) -> None:
    """Write one evaluation's files, then tell the hub. It counts as done when they are there."""
    count = len(config.recipe.eval.benchmarks)
    drawn, greedy = results[:count], results[count:]
    folder, figures = config.run_dir / "eval", eval_files.figures(drawn, greedy)
    eval_files.write_results(folder, when, drawn, greedy)
    hub.metrics(eval_files.metric_records(config.name, when, figures))
    hub.eval_done(when.step, when.version, figures)
    partial = eval_files.partial_of(folder, when.step)
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # the next evaluation keeps samples there
        partial.parent.rmdir()


def evaluate_once(evaluator: Evaluator, out: Path) -> None:
    """One evaluation, files in the directory `out`, which hold nothing that differs between runs."""
    recipe, stop = evaluator.config.recipe, evaluator.reporter.stop_requested
    results = _until_stop(evaluator.evaluate(out / "partial"), stop)
    version = next((sample.version for result in results for sample in result.samples), 0)
    eval_files.write_results(out, Evaluation(0, version, 0), results)
    greedy = _until_stop(evaluator.evaluate(out / "partial" / "greedy", greedy=True), stop)
    document = {
        "step": 0,
        "version": version,
        "seed": recipe.seed,
        "temperature": recipe.eval.temperature,
        "results": eval_files.timeless(eval_files.figures(results)),
        "greedy": eval_files.timeless(eval_files.figures(greedy)),
    }
    eval_files.write_csv(out / "results.csv", document)
    write_atomic(out / "results.json", json.dumps(document, indent=2) + "\n", sync=True)
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
    worker_main(run, EvalConfig)
