"""One benchmark through one engine: ask, check the version, grade, count.

Every item stands in the denominator: an unanswered, aborted-for-good, over-long or ungradable sample is a wrong one
with its own verdict. A request's random draws depend on (seed, benchmark, item, sample) alone, so the same weights give
the same samples in any order, and a paired comparison of two versions draws alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from astracli.adapter import chat_prompt_tokens
from astracli.errors import RunFailed
from astracli.rl import passk
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
    """float32 [T], before temperature"""
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

    def figures(self) -> dict[str, float | int]:
        """Everything countable, names with units."""
        score, total = self.score, max(1, len(self.samples))
        verdicts = [sample.grade.verdict for sample in self.samples]
        tokens = sum(len(sample.tokens) for sample in self.samples)
        return {
            **score_figures(score),
            "wall_s": round(self.wall_s, 3),
            "tokens": tokens,
            "response_tokens_mean": tokens / total,
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


def sample_seed(seed: int, benchmark: str, problem_id: str, sample: int) -> int:
    """63-bit seed of one sample's draws; the weight version has no part in it."""
    return xxhash.xxh64_intdigest(f"{seed}\n{benchmark}\n{problem_id}\n{sample}".encode()) >> 1


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
    fixed_calls: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Sample every item `samples` times (None: the benchmark's own) and score it.

    At most `max_concurrency` samples are with the engine at once; with `fixed_calls` they are the same ones each time,
    in one call (for an engine that runs nothing beside a call). `version` is the weight version that must have
    answered; None takes any. `on_progress(done, total)` counts samples. Raises RunFailed when another version answers,
    or when the engine does not come back.
    """
    started = time.monotonic()
    n = samples or benchmark.samples
    asked, found = _asked(benchmark, tokenizer, sampling, n, version)
    total = len(asked) + len(found)
    chunk = min(_SHORT_SAMPLES, max_concurrency) if sampling.max_new_tokens <= _SHORT_TOKENS else 1
    calls = _calls(asked, max_concurrency, span=True) if fixed_calls else _calls(asked, chunk, span=False)
    gate = asyncio.Semaphore(1 if fixed_calls else max(1, max_concurrency // chunk))

    async def ask(call: list[_Asked]) -> None:
        async with gate:
            answers = await generate_all(engine, [item.request for item in call], version)
        done = await _grade(call, answers, tokenizer, pool)
        found.update({(item.place, item.number): sample for item, sample in zip(call, done, strict=True)})
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


@dataclass(frozen=True)
class _Asked:
    """One sample and its request."""

    place: int
    """Of the item, in the benchmark's order."""
    problem: Problem
    number: int
    request: GenRequest


def _asked(
    benchmark: Benchmark, tokenizer: Any, sampling: Sampling, n: int, version: int | None
) -> tuple[list[_Asked], dict[tuple[int, int], EvalSample]]:
    """(what is asked, by item; (item, number) -> samples that need no asking: their prompt leaves no room)."""
    asked: list[_Asked] = []
    unasked: dict[tuple[int, int], EvalSample] = {}
    for place, problem in enumerate(benchmark.items):
        prompt = chat_prompt_tokens(tokenizer, benchmark.text(problem))
        room = min(sampling.max_new_tokens, sampling.context_length - len(prompt))
        for number in range(n):
            if room > 0:
                request = _request(benchmark.name, problem, prompt, number, room, sampling)
                asked.append(_Asked(place, problem, number, request))
            else:
                unasked[place, number] = _unasked(problem, number, version or 0)
    return asked, unasked


def _calls(asked: Sequence[_Asked], size: int, *, span: bool) -> list[list[_Asked]]:
    """Calls of at most `size` samples in order; a call spans several items only with `span`."""
    calls: list[list[_Asked]] = []
    for item in asked:
        if not calls or len(calls[-1]) == size or not (span or calls[-1][0].place == item.place):
            calls.append([])
        calls[-1].append(item)
    return calls


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
    call: Sequence[_Asked], answers: Sequence[GenResult], tokenizer: Any, pool: GradePool
) -> list[EvalSample]:
    texts = [tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True) for answer in answers]
    items = [GradeItem(a.problem.question, a.problem.answer, text) for a, text in zip(call, texts, strict=True)]
    grades = await pool.agrade(items)
    return [
        EvalSample(a.problem, a.number, got.version, text, got.tokens, got.logprobs, got.finish_reason, grade)
        for a, got, text, grade in zip(call, answers, texts, grades, strict=True)
    ]


def _unasked(problem: Problem, sample: int, version: int) -> EvalSample:
    empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
    return EvalSample(problem, sample, version, "", *empty, "prompt_too_long", Grade(0.0, "no_answer"))
