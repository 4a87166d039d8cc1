"""One benchmark through one engine: every item counted, the version enforced, calls bounded, patience limited."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eval_cases import SAMPLING, FakeEngine, expected_average, run_benchmark, small

from astracli.errors import RunFailed
from astracli.evaluation.benchmark import sample_seed


def test_seeds_depend_on_run_benchmark_item_and_sample_only() -> None:
    seeds = {sample_seed(s, b, p, i) for s in (0, 1) for b in ("a", "b") for p in ("x", "y") for i in range(4)}
    assert len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    first, second = FakeEngine(7), FakeEngine(8)
    run_benchmark(first, small(5))
    run_benchmark(second, small(5), version=8, max_concurrency=3)
    assert sorted(r.seed for r in first.requests) == sorted(r.seed for r in second.requests)


def test_average_is_over_all_items_and_samples() -> None:
    benchmark = small(40)
    progress: list[tuple[int, int]] = []
    result = run_benchmark(FakeEngine(), benchmark, on_progress=lambda work: progress.append((work.done, work.total)))
    assert result.score.avg_at_n == pytest.approx(expected_average(benchmark.items, 8))
    assert (result.score.items, result.score.n, result.score.k) == (40, 8, 4)
    assert progress[-1] == (320, 320)
    assert [(s.problem.id, s.sample) for s in result.samples[:9]] == [
        *((benchmark.items[0].id, i) for i in range(8)),
        (benchmark.items[1].id, 0),
    ]
    assert 0 < result.figures()["response_tokens_mean"] < 24


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_no_more_samples_in_flight_than_allowed(limit: int) -> None:
    engine = FakeEngine()
    run_benchmark(engine, small(20), max_concurrency=limit)
    assert 0 < engine.most <= limit
    long = FakeEngine()
    run_benchmark(
        long, small(20), max_concurrency=limit, sampling=replace(SAMPLING, max_new_tokens=5000, context_length=9999)
    )
    assert long.most == limit


def test_fixed_calls_are_full_in_order_and_one_at_a_time() -> None:
    engine, usual = FakeEngine(), FakeEngine()
    exact = run_benchmark(engine, small(5), whole_calls=True, max_concurrency=16)
    assert [len(call) for call in engine.calls] == [16, 16, 8] and engine.most == 16
    assert [r.seed for r in engine.requests] == [
        sample_seed(5, "arithmetic-heldout", item.id, i) for item in small(5).items for i in range(8)
    ]
    same = run_benchmark(usual, small(5), max_concurrency=16)
    assert [(s.problem.id, s.sample, s.text) for s in exact.samples] == [
        (s.problem.id, s.sample, s.text) for s in same.samples
    ]


def test_aborted_requests_and_a_restarting_engine_are_asked_again() -> None:
    engine = FakeEngine()
    engine.aborts, engine.failures, engine.healthy = 11, 3, False
    benchmark = small(6)
    result = run_benchmark(engine, benchmark)
    assert result.score.avg_at_n == pytest.approx(expected_average(benchmark.items, 8))
    assert {s.finish_reason for s in result.samples} == {"stop"}


def test_a_healthy_engine_that_refuses_ends_the_evaluation() -> None:
    engine = FakeEngine()
    engine.failures = 10**6
    with pytest.raises(RunFailed, match="is gone"):
        run_benchmark(engine, small(1))


def test_a_healthy_engine_may_refuse_twice() -> None:
    engine = FakeEngine()
    engine.failures = 2
    assert len(run_benchmark(engine, small(1)).samples) == 8 and len(engine.calls) == 3


def test_an_answer_that_lived_through_an_update_is_an_error() -> None:
    engine = FakeEngine()
    engine.started = 6
    with pytest.raises(RunFailed, match="pinned to version 7 was answered by version 6"):
        run_benchmark(engine, small(1))


def test_samples_beyond_those_asked_for_are_left_out() -> None:
    progress: list[int] = []
    before = run_benchmark(FakeEngine(), small(1)).samples
    engine = FakeEngine()
    result = run_benchmark(
        engine,
        small(2),
        samples=2,
        done_before=before,
        on_progress=lambda work: progress.append((work.done, work.total)),
    )
    assert (len(result.samples), len(engine.requests), progress) == (4, 2, [(2, 4), (4, 4)])


def test_another_version_is_an_error() -> None:
    with pytest.raises(RunFailed, match="pinned to version 7 was answered by version 9"):
        run_benchmark(FakeEngine(9), small(2))
    assert run_benchmark(FakeEngine(9), small(2), version=None).samples[0].version == 9


def test_prompts_that_do_not_fit_count_as_wrong() -> None:
    benchmark = small(4)
    length = len(benchmark.items[2].question)  # a three-digit problem
    result = run_benchmark(FakeEngine(), benchmark, sampling=replace(SAMPLING, context_length=length))
    figures = result.figures()
    assert figures["items"] == 4 and figures["prompts_too_long"] == 16 and figures["truncated_fraction"] == 0.0
    assert all(s.grade.verdict == "no_answer" for s in result.samples if s.finish_reason == "prompt_too_long")
