"""One benchmark through one engine: ask, check the version, grade, count.

Every item stands in the denominator: an unanswered, aborted-for-good, over-long or ungradable sample is a wrong one
with its own verdict. A request's random draws depend on (seed, benchmark, item, sample) alone, so the same weights give
the same samples in any order, and a paired comparison of two versions draws alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from astracli.adapter import chat_prompt_tokens
from astracli.errors import RunFailed
from astracli.rl import passk, votes
from astracli.rl.reward import Grade, GradeItem, GradePool

if TYPE_CHECKING:
    from astracli.data.benchmarks import Benchmark
    from astracli.data.prompts import Problem
    from astracli.engines.client import GenRequest, GenResult

_SHORT_TOKENS = 256
"""Up to here a completion is so short that one HTTP request carries several samples of an item."""
_SHORT_SAMPLES = 8
_PATIENCE_S = 900.0
"""How long an engine may be away, or abort a request again and again, before the evaluation gives up."""


class Engine(Protocol):
    """What an evaluation needs of `engines.client.EngineClient`."""

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]: ...

    async def health(self) -> bool: ...


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_new_tokens: int
    context_length: int
    """Prompt and completion together; a longer prompt is not asked and counts as wrong."""
    stop_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class EvalSample:
    problem: Problem
    sample: int
    """0 to n - 1."""
    version: int
    text: str
    tokens: np.ndarray
    """int32 [T]"""
    logprobs: np.ndarray
    """float32 [T], after temperature (0: that of 1), before top-p"""
    finish_reason: str
    """`stop`, `length`, or `prompt_too_long`."""
    grade: Grade


@dataclass(frozen=True)
class Result:
    benchmark: str
    score: passk.Score
    samples: list[EvalSample] = field(repr=False)
    """Items in the benchmark's order, samples within. Not in the repr: asyncio may build that."""
    wall_s: float

    def majority_at(self) -> dict[int, float]:
        """{k: majority@k}, see `votes`."""
        n = self.score.n
        cast = [votes.vote(sample.text, sample.grade.verdict == "right") for sample in self.samples]
        return votes.majority_at([cast[i : i + n] for i in range(0, len(cast), n)])

    def figures(self) -> dict[str, Any]:
        """Everything countable, names with units; `pass_at` and `majority_at` by k."""
        score, total = self.score, max(1, len(self.samples))
        verdicts = [sample.grade.verdict for sample in self.samples]
        tokens = sum(len(sample.tokens) for sample in self.samples)
        return {
            **full_figures(score),
            "majority_at": {str(k): share for k, share in self.majority_at().items()},
            "wall_s": round(self.wall_s, 3),
            "tokens": tokens,
            "response_tokens_mean": tokens / total,
            "response_tokens_max": max((len(sample.tokens) for sample in self.samples), default=0),
            "truncated_fraction": sum(sample.finish_reason == "length" for sample in self.samples) / total,
            "no_answer_fraction": verdicts.count("no_answer") / total,
            "timeouts": verdicts.count("timeout"),
            "errors": verdicts.count("error"),
            "prompts_too_long": sum(sample.finish_reason == "prompt_too_long" for sample in self.samples),
        }


def score_figures(score: passk.Score) -> dict[str, float | int]:
    return {
        "items": score.items,
        "n": score.n,
        "avg_at_n": score.avg_at_n,
        "stderr": score.stderr,
        "k": score.k,
        "pass_at_k": score.pass_at_k,
    }


def full_figures(score: passk.Score) -> dict[str, Any]:
    """`score_figures`, the 95 % interval and pass@k for every k."""
    low, high = score.interval
    passed = {str(k): share for k, share in enumerate(score.pass_at, 1)}
    return {**score_figures(score), "ci95_low": low, "ci95_high": high, "pass_at": passed}


def sample_seed(seed: int, benchmark: str, problem_id: str, sample: int) -> int:
    """63-bit seed of one sample's draws; the weight version has no part in it."""
    return xxhash.xxh64_intdigest(f"{seed}\n{benchmark}\n{problem_id}\n{sample}".encode()) >> 1


Unit = tuple[int, int]
"""(place of the item, number of the sample)"""


def _calls(
    items: int, n: int, done: Container[Unit], sampling: Sampling, max_concurrency: int, whole: bool
) -> list[list[Unit]]:
    """What goes into one request to the engine: several samples of an item when they are short.

    `whole`: the same calls whatever is done already, as large as may be in flight; they are left out when nothing in
    them is missing. An engine that takes one call at a time then computes the same bits in every evaluation.
    """
    units = [(place, i) for place in range(items) for i in range(n)]
    if whole:
        cut = [units[i : i + max_concurrency] for i in range(0, len(units), max_concurrency)]
        return [call for call in cut if any(unit not in done for unit in call)]
    size = min(_SHORT_SAMPLES, max_concurrency) if sampling.max_new_tokens <= _SHORT_TOKENS else 1
    by_item = [[unit for unit in units[i : i + n] if unit not in done] for i in range(0, len(units), n)]
    return [todo[i : i + size] for todo in by_item for i in range(0, len(todo), size)]


async def evaluate_benchmark(
    engine: Engine,
    benchmark: Benchmark,
    tokenizer: Any,
    pool: GradePool,
    *,
    sampling: Sampling,
    samples: int | None = None,
    version: int | None = None,
    pass_k: int | None = None,
    max_concurrency: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    done_before: Sequence[EvalSample] = (),
    on_samples: Callable[[Sequence[EvalSample]], None] | None = None,
    whole_calls: bool = False,
) -> Result:
    """Sample every item `samples` times (None: the benchmark's own) and score it.

    At most `max_concurrency` samples are with the engine at once. `version` is the weight version that must have
    answered; None takes any. `on_progress(done, total)` counts samples. `done_before` are samples of an earlier
    attempt, which are not asked again; `on_samples` gets the new ones as they come, in no order. `whole_calls`: see
    `_calls`. Raises RunFailed when another version answers,
    or when the engine does not come back.
    """
    started = time.monotonic()
    n = samples or benchmark.samples
    total = n * len(benchmark.items)
    places = {problem.id: place for place, problem in enumerate(benchmark.items)}
    found = {(places[s.problem.id], s.sample): s for s in done_before if s.problem.id in places and s.sample < n}
    prompts = [chat_prompt_tokens(tokenizer, benchmark.text(problem)) for problem in benchmark.items]
    calls = _calls(len(prompts), n, found, sampling, max_concurrency, whole_calls)
    gate = asyncio.Semaphore(max(1, max_concurrency // max(map(len, calls), default=1)))

    async def ask(units: Sequence[Unit]) -> None:
        rooms = [min(sampling.max_new_tokens, sampling.context_length - len(prompts[place])) for place, _ in units]
        asked = [(unit, room) for unit, room in zip(units, rooms, strict=True) if room > 0]
        done = [
            _unasked(benchmark.items[p], i, version or 0)
            for (p, i), room in zip(units, rooms, strict=True)
            if room <= 0
        ]
        if asked:
            requests = [
                _request(benchmark.name, benchmark.items[p], prompts[p], i, room, sampling) for (p, i), room in asked
            ]
            async with gate:
                answers = await generate_all(engine, requests, version)
            done += await _grade([(benchmark.items[p], i) for (p, i), _ in asked], answers, tokenizer, pool)
        found.update({(places[sample.problem.id], sample.sample): sample for sample in done})
        if on_samples is not None:
            on_samples(done)
        if on_progress is not None:
            on_progress(len(found), total)

    try:
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(ask(call))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    ordered = [found[place, i] for place in range(len(benchmark.items)) for i in range(n)]
    right = [[s.grade.verdict == "right" for s in ordered[i : i + n]] for i in range(0, total, n)]
    return Result(benchmark.name, passk.score(right, pass_k or benchmark.pass_k), ordered, time.monotonic() - started)


class Spread:
    """Several engines as one: a request goes to the engine that has the fewest samples, of equals to the first."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = list(engines)
        self._in_flight = [0] * len(self._engines)

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        place = self._in_flight.index(min(self._in_flight))
        self._in_flight[place] += len(requests)
        try:
            return await self._engines[place].generate(requests)
        finally:
            self._in_flight[place] -= len(requests)

    async def health(self) -> bool:
        """Whether all of them are there: a refusal of one is not excused by another."""
        return all(await asyncio.gather(*(engine.health() for engine in self._engines)))


async def generate_all(engine: Engine, requests: Sequence[GenRequest], version: int | None) -> list[GenResult]:
    """One finished answer per request; what comes back aborted, or meets an engine that restarts, is sent again.

    Raises RunFailed: another version answered, a healthy engine fails three times, or patience is at its end.
    """
    answers: dict[int, GenResult] = {}
    deadline = time.monotonic() + _PATIENCE_S
    pause_s, refusals = 0.05, 0
    while True:
        todo = [i for i in range(len(requests)) if i not in answers]
        failure: RunFailed | None = None
        try:
            replies = await engine.generate([requests[i] for i in todo])
        except RunFailed as error:
            replies, failure = [], error
            refusals += await engine.health()
        for i, reply in zip(todo, replies, strict=False):
            if reply.finish_reason != "abort":
                _check_version(reply, version)
                answers[i] = reply
        if len(answers) == len(requests):
            return [answers[i] for i in range(len(requests))]
        if refusals == 3 or time.monotonic() > deadline:
            raise failure or RunFailed(f"the engine aborted an evaluation request for {_PATIENCE_S:g} s")
        await asyncio.sleep(pause_s)
        pause_s = min(2.0, 2 * pause_s)


def _check_version(reply: GenResult, version: int | None) -> None:
    if version is None or (reply.version == version and reply.version_start == version):
        return
    other = reply.version if reply.version != version else reply.version_start
    raise RunFailed(
        f"an evaluation pinned to version {version} was answered by version {other}",
        "the engine was updated while it was pinned; its log and the rollout worker's say when",
    )


def _request(
    benchmark: str, problem: Problem, prompt: list[int], sample: int, room: int, sampling: Sampling
) -> GenRequest:
    from astracli.engines.client import GenRequest

    return GenRequest(
        input_ids=prompt,
        max_new_tokens=room,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sample_seed(sampling.seed, benchmark, problem.id, sample),
    )


async def _grade(
    asked: Sequence[tuple[Problem, int]], answers: Sequence[GenResult], tokenizer: Any, pool: GradePool
) -> list[EvalSample]:
    texts = [tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True) for answer in answers]
    items = [GradeItem(problem.question, problem.answer, text) for (problem, _), text in zip(asked, texts, strict=True)]
    grades = await pool.agrade(items)
    return [
        EvalSample(problem, i, answer.version, text, answer.tokens, answer.logprobs, answer.finish_reason, grade)
        for (problem, i), answer, text, grade in zip(asked, answers, texts, grades, strict=True)
    ]


def _unasked(problem: Problem, sample: int, version: int) -> EvalSample:
    empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
    return EvalSample(problem, sample, version, "", *empty, "prompt_too_long", Grade(0.0, "no_answer"))
