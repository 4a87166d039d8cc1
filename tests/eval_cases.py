"""What the tests of evaluation share: a stand-in for an engine, which answers held-out arithmetic.

Sample seeds that are multiples of four are answered wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from astracli.data import benchmarks
from astracli.data.benchmarks import Benchmark
from astracli.data.prompts import Problem
from astracli.engines.contract import GenRequest, GenResult
from astracli.errors import RunFailed
from astracli.evaluation.benchmark import BenchmarkWork, EvalSampling, Result, sample_seed
from astracli.evaluation.spread import evaluate
from astracli.rewards.reward import Grade, GradeItem, GradePool

CHARACTERS = "0123456789+-= \\boxed{}"
VOCABULARY = {c: i for i, c in enumerate(["<pad>", "<eos>", *dict.fromkeys(CHARACTERS)])}
SYMBOLS = list(VOCABULARY)
SAMPLING = EvalSampling(temperature=1.0, top_p=1.0, max_new_tokens=24, context_length=64, stop_token_ids=(1,), seed=5)


class CharTokenizer:
    chat_template = None
    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [VOCABULARY[c] for c in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(SYMBOLS[i] for i in ids if i > 1)


def answer_tokens(prompt: Sequence[int], seed: int) -> list[int]:
    question = CharTokenizer().decode(prompt).rstrip("=")
    right = eval(question)
    return [*CharTokenizer()(f"\\boxed{{{right + (seed % 4 == 0)}}}")["input_ids"], 1]


class InstantGrader:
    """Right when the answer is in the box."""

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]:
        right = [item.text == f"\\boxed{{{item.answer}}}" for item in items]
        return [Grade(float(one), "right" if one else "wrong") for one in right]


class FakeEngine:
    """Answers at once; counts what is in flight; can abort, fail and change its version."""

    def __init__(self, version: int = 7) -> None:
        self.version = self.started = version
        self.in_flight = self.most = 0
        self.aborts = self.failures = 0
        self.healthy = True
        self.requests: list[GenRequest] = []
        self.calls: list[list[GenRequest]] = []

    async def health(self) -> bool:
        return self.healthy or not self.failures

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        self.requests += requests
        self.calls.append(list(requests))
        self.in_flight += len(requests)
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= len(requests)
        if self.failures:
            self.failures -= 1
            raise RunFailed("engine at nowhere is gone")
        results = []
        for request in requests:
            tokens = np.array(answer_tokens(request.input_ids, request.seed), np.int32)
            reason: Any = "stop"
            if self.aborts:
                self.aborts -= 1
                tokens, reason = tokens[:2], "abort"
            logprobs = np.full(len(tokens), -0.5, np.float32)
            results.append(GenResult(tokens, logprobs, reason, self.version, self.started, ""))
        return results


def small(n: int) -> Benchmark:
    return replace(benchmarks.load("arithmetic-heldout"), items=benchmarks.load("arithmetic-heldout").items[:n])


def run_benchmark(engine: FakeEngine, benchmark: Benchmark, **options: Any) -> Result:
    """With one engine."""
    return run_benchmarks({"engine0": engine}, [benchmark], **options)[0]


def run_benchmarks(engines: dict[str, FakeEngine], sets: Sequence[Benchmark], **options: Any) -> list[Result]:
    """`options` of `BenchmarkWork` and of `evaluate`; `grader` in the place of processes that grade."""
    of_run = {key: options.pop(key) for key in ("members", "on_progress", "on_waiting") if key in options}
    options = {"sampling": SAMPLING, "version": 7, "max_concurrency": 64} | options
    fixed, most = options.get("whole_calls", False), options["max_concurrency"]
    with contextlib.ExitStack() as stack:
        grader = options.pop("grader", None) or stack.enter_context(GradePool())
        works = [BenchmarkWork(benchmark, CharTokenizer(), grader, **options) for benchmark in sets]
        return asyncio.run(evaluate(works, engines, max_concurrency=most, fixed=fixed, **of_run))


def expected_average(items: Sequence[Problem], n: int) -> float:
    wrong = [sample_seed(5, "arithmetic-heldout", p.id, i) % 4 == 0 for p in items for i in range(n)]
    return 1 - sum(wrong) / len(wrong)
