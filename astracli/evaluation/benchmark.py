"""One benchmark of an evaluation: what is asked, which version must answer, how answers are graded and counted.

Every item stands in the denominator: an unanswered, over-long or ungradable sample is a wrong one with its own verdict.
A request's random draws depend on (seed, benchmark, item, sample) alone, so the same weights give the same samples in
any order and from any engine, and a paired comparison of two versions draws alike. `spread` asks the engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from astracli.engines.contract import GenRequest, GenResult
from astracli.engines.stops import StopStrings
from astracli.errors import RunFailed
from astracli.evaluation import passk, votes
from astracli.models.adapter import chat_prompt_tokens
from astracli.models.chat import ChatFormat
from astracli.rewards.reward import Grade, GradeItem, GradePool

if TYPE_CHECKING:
    from astracli.data.benchmarks import Benchmark
    from astracli.data.prompts import Problem
    from astracli.engines.client import EngineClient

_SHORT_TOKENS = 256
"""Up to here a completion is so short that one HTTP request carries several samples of an item."""
_SHORT_SAMPLES = 8


@dataclass(frozen=True)
class EvalSampling:
    """How completions are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_new_tokens: int
    context_length: int
    """Prompt and completion together; a longer prompt is not asked and counts as wrong."""
    stop_token_ids: tuple[int, ...]
    seed: int
    stop: StopStrings | None = None
    chat: ChatFormat = field(default_factory=ChatFormat)


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
    """float32 [N] of the drawn tokens, after temperature (0: that of 1), before top-p"""
    finish_reason: str
    """`stop`, `length`, `prompt_too_long`, or `error`: its environment has failed."""
    grade: Grade
    loss_mask: np.ndarray | None = None
    """bool [T]: the policy drew the token; None: all."""


@dataclass(frozen=True)
class Result:
    benchmark: str
    score: passk.Score
    samples: list[EvalSample] = field(repr=False)
    """Items in the benchmark's order, samples within. Not in the repr: asyncio may build that."""
    wall_s: float
    grader: str = "math"
    """What judged the answers."""
    episodes: bool = False
    """Whether the samples are episodes of an environment: then its named figures have means."""

    def majority_at(self) -> dict[int, float]:
        """{k: majority@k}, see `votes`."""
        n = self.score.n
        cast = [votes.vote(sample.text, sample.grade.verdict == "right") for sample in self.samples]
        return votes.majority_at([cast[i : i + n] for i in range(0, len(cast), n)])

    @property
    def no_answer_fraction(self) -> float:
        """Share of the samples in which no answer could be read."""
        return sum(sample.grade.verdict == "no_answer" for sample in self.samples) / max(1, len(self.samples))

    def figures(self) -> dict[str, Any]:
        """Everything countable, names with units; `pass_at` and `majority_at` by k."""
        score, total = self.score, max(1, len(self.samples))
        verdicts = [sample.grade.verdict for sample in self.samples]
        tokens = sum(len(sample.logprobs) for sample in self.samples)
        return {
            "grader": self.grader,
            **full_figures(score),
            "majority_at": {str(k): share for k, share in self.majority_at().items()},
            "wall_s": round(self.wall_s, 3),
            "tokens": tokens,
            "response_tokens_mean": tokens / total,
            "response_tokens_max": max((len(sample.logprobs) for sample in self.samples), default=0),
            "truncated_fraction": sum(sample.finish_reason == "length" for sample in self.samples) / total,
            "no_answer_fraction": self.no_answer_fraction,
            "timeouts": verdicts.count("timeout"),
            "errors": verdicts.count("error"),
            "prompts_too_long": sum(sample.finish_reason == "prompt_too_long" for sample in self.samples),
            **(self._part_means() if self.episodes else {}),
        }

    def _part_means(self) -> dict[str, float]:
        """{`turns_mean`: ...}: of each named figure, over the samples that have it."""
        found: dict[str, list[float]] = {}
        for sample in self.samples:
            for name, value in sample.grade.parts.items():
                found.setdefault(f"{name}_mean", []).append(value)
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def score_figures(score: passk.Score) -> dict[str, float | int]:
    """Without pass@k for every k."""
    return {name: value for name, value in vars(score).items() if name != "pass_at"}


def full_figures(score: passk.Score) -> dict[str, Any]:
    """`score_figures`, the 95 % interval and pass@k for every k."""
    low, high = score.interval
    passed = {str(k): share for k, share in enumerate(score.pass_at, 1)}
    return {**score_figures(score), "ci95_low": low, "ci95_high": high, "pass_at": passed}


def sample_seed(seed: int, benchmark: str, problem_id: str, sample: int, turn: int = 0) -> int:
    """63-bit seed of the draws of one turn of a sample; the weight version has no part in it."""
    text = f"{seed}\n{benchmark}\n{problem_id}\n{sample}" + (f"\n{turn}" if turn else "")
    return xxhash.xxh64_intdigest(text.encode()) >> 1


Unit = tuple[int, int]
"""(place of the item, number of the sample)"""


def _calls(
    items: int, n: int, done: Container[Unit], sampling: EvalSampling, max_concurrency: int, whole: bool
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


class BenchmarkWork:
    """The samples of one benchmark at one version: those that are there, and the calls that bring the others."""

    episodes = False
    """Whether a sample is an episode of an environment."""

    def __init__(
        self,
        benchmark: Benchmark,
        tokenizer: Any,
        grader: GradePool,
        *,
        sampling: EvalSampling,
        samples: int | None = None,
        version: int | None = None,
        pass_k: int | None = None,
        max_concurrency: int = 64,
        whole_calls: bool = False,
        done_before: Sequence[EvalSample] = (),
        on_samples: Callable[[Sequence[EvalSample]], None] | None = None,
    ):
        """`samples` of every item, None: the benchmark's own. `version`: what must have answered, None: any.
        `done_before` are samples of an earlier attempt, which are not asked again; `on_samples` gets the new ones
        as they come, in no order. `whole_calls`, `max_concurrency`: see `_calls`."""
        self.benchmark = benchmark
        self.n = samples or benchmark.samples
        self.total = self.n * len(benchmark.items)
        self._tokenizer, self._grader, self.sampling = tokenizer, grader, sampling
        self.version, self._pass_k, self._on_samples = version, pass_k or benchmark.pass_k, on_samples
        self._places = {problem.id: place for place, problem in enumerate(benchmark.items)}
        places = self._places
        self._found = {
            (places[s.problem.id], s.sample): s for s in done_before if s.problem.id in places and s.sample < self.n
        }
        self._whole = whole_calls
        self._prepare()
        self.calls = _calls(len(benchmark.items), self.n, self._found, sampling, max_concurrency, whole_calls)
        self._began = self._ended = time.monotonic()

    def _prepare(self) -> None:
        self._prompts = [
            chat_prompt_tokens(self._tokenizer, self.benchmark.messages(problem), self.sampling.chat)
            for problem in self.benchmark.items
        ]

    @property
    def done(self) -> int:
        """Samples that are there."""
        return len(self._found)

    def begin(self) -> None:
        """The first call is sent now."""
        self._began = self._ended = time.monotonic()

    async def ask(self, units: Sequence[Unit], engine: EngineClient) -> list[tuple[Unit, Any]]:
        """What an engine answers, None for what it has aborted; nothing for a unit whose prompt leaves no room. Raises
        RunFailed when it does not answer."""
        rooms = {unit: self._room(unit) for unit in units}
        asked = [(unit, self._request(unit, room)) for unit, room in rooms.items() if room > 0]
        answers = await engine.generate([request for _, request in asked]) if asked else []
        pairs = zip(asked, answers, strict=True)
        return [(unit, None if answer.finish_reason == "abort" else answer) for (unit, _), answer in pairs]

    async def record(self, units: Sequence[Unit], answers: Sequence[tuple[Unit, Any]]) -> None:
        """Grade and keep the answers, and with them what is not asked of `units`. Raises RunFailed when another version
        has answered."""
        items = self.benchmark.items
        done = [_unasked(items[p], i, self.version or 0) for p, i in units if self._room((p, i)) <= 0]
        if answers:
            done += await self._graded(answers)
        self._found.update({(self._places[sample.problem.id], sample.sample): sample for sample in done})
        self._ended = time.monotonic()
        if self._on_samples is not None and done:
            self._on_samples(done)

    def result(self) -> Result:
        """Once every sample is there."""
        ordered = [self._found[place, i] for place in range(len(self.benchmark.items)) for i in range(self.n)]
        right = [[s.grade.verdict == "right" for s in ordered[i : i + self.n]] for i in range(0, self.total, self.n)]
        score = passk.score(right, self._pass_k)
        wall_s = self._ended - self._began
        return Result(self.benchmark.name, score, ordered, wall_s, self.benchmark.grader, self.episodes)

    def _room(self, unit: Unit) -> int:
        return min(self.sampling.max_new_tokens, self.sampling.context_length - len(self._prompts[unit[0]]))

    def _request(self, unit: Unit, room: int) -> GenRequest:
        (place, sample), sampling = unit, self.sampling
        return GenRequest(
            input_ids=self._prompts[place],
            max_new_tokens=room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=list(sampling.stop_token_ids),
            seed=sample_seed(sampling.seed, self.benchmark.name, self.benchmark.items[place].id, sample),
            stop=sampling.stop,
        )

    async def _graded(self, answers: Sequence[tuple[Unit, Any]]) -> list[EvalSample]:
        for _, answer in answers:
            check_version(answer, self.version)
        items = self.benchmark.items
        return await self._grade([(items[p], i) for (p, i), _ in answers], [answer for _, answer in answers])

    async def _grade(self, asked: Sequence[tuple[Problem, int]], answers: Sequence[GenResult]) -> list[EvalSample]:
        texts = [self._tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True) for answer in answers]
        groups: dict[str, list[GradeItem]] = {}
        for (problem, _), text, answer in zip(asked, texts, answers, strict=True):
            item = GradeItem(
                problem.question, problem.answer, text, answer.tokens.tolist(), problem.messages, problem.row
            )
            groups.setdefault(problem.id, []).append(item)
        found = await asyncio.gather(*(self._grader.agrade(items) for items in groups.values()))
        graded = {name: iter(grades) for name, grades in zip(groups, found, strict=True)}
        grades = [next(graded[problem.id]) for problem, _ in asked]
        return [
            EvalSample(problem, i, answer.version, text, answer.tokens, answer.logprobs, answer.finish_reason, grade)
            for (problem, i), answer, text, grade in zip(asked, answers, texts, grades, strict=True)
        ]


def check_version(reply: GenResult, version: int | None) -> None:
    """Raises RunFailed when another version than the evaluated one has answered; None: any may."""
    if version is None or (reply.version == version and reply.version_start == version):
        return
    other = reply.version if reply.version != version else reply.version_start
    raise RunFailed(
        f"an evaluation pinned to version {version} was answered by version {other}",
        "the engine was updated while it was pinned; its log and the rollout worker's say when",
    )


def _unasked(problem: Problem, sample: int, version: int) -> EvalSample:
    empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
    return EvalSample(problem, sample, version, "", *empty, "prompt_too_long", Grade(0.0, "no_answer"))
