"""One evaluation over several engines: who serves how much, who is let go when, and what a lost engine leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
from eval_cases import SAMPLING, FakeEngine, InstantGrader, expected_average, run_benchmark, run_benchmarks, small

from astracli.engines.contract import GenRequest, GenResult
from astracli.errors import RunFailed
from astracli.evaluation import spread as eval_spread


class TimedEngine(FakeEngine):
    """Takes so long for a call; `die_after` calls it is gone until `revive` is called."""

    def __init__(self, seconds: float = 0.001, die_after: int | None = None):
        super().__init__()
        self.seconds, self.left = seconds, die_after
        self.served = 0

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        await asyncio.sleep(self.seconds)
        if self.left == 0:
            self.healthy, self.failures = False, 1
            raise RunFailed("engine at nowhere is gone")
        self.left = None if self.left is None else self.left - 1
        answers = await super().generate(requests)
        self.served += len(answers)
        return answers

    def revive(self) -> None:
        self.healthy, self.failures, self.left = True, 0, None


class Hub:
    """Says who holds the version, and keeps who was released in which order."""

    def __init__(self, *names: str):
        self.names = list(names)
        self.released: list[str] = []
        self._changed = asyncio.Event()

    async def holders(self, known: Collection[str] | None) -> Collection[str]:
        while known is not None and list(known) == self.names:
            self._changed.clear()
            await self._changed.wait()
        return list(self.names)

    async def slots(self, engine: str, wants: int, holds: int) -> int:
        return 1000

    async def release(self, engine: str) -> None:
        self.released.append(engine)
        self.set(*(name for name in self.names if name != engine))

    def set(self, *names: str) -> None:
        self.names = list(names)
        self._changed.set()


def spread(engines: dict[str, Any], items: int = 16, **options: Any) -> Any:
    """One benchmark of 8 samples an item, one request a sample, 4 at an engine at once."""
    long = replace(SAMPLING, max_new_tokens=300, context_length=400)
    settings = {"sampling": long, "max_concurrency": 4, "grader": InstantGrader()}
    (result,) = run_benchmarks(engines, [small(items)], **settings, **options)
    return result


def test_a_slower_engine_serves_less_and_each_is_let_go_when_its_share_is_served() -> None:
    fast, slow, hub = TimedEngine(0.002), TimedEngine(0.04), Hub("fast", "slow")
    result = spread({"slow": slow, "fast": fast}, members=hub)
    assert result.score.avg_at_n == expected_average(small(16).items, 8)
    assert fast.served + slow.served == 128 and fast.served > 4 * slow.served > 0
    assert (fast.most, slow.most) == (4, 4)
    assert sorted(hub.released) == ["fast", "slow"], "each once; which is last depends on the machine"


def test_an_engine_that_arrives_late_serves_the_rest() -> None:
    first, late, hub = TimedEngine(0.05), TimedEngine(0.001), Hub("first")

    def arrive(work: Any) -> None:
        if work.done >= 32:
            hub.set("first", "late")

    result = spread({"first": first, "late": late}, members=hub, on_progress=arrive)
    assert len(result.samples) == 128
    assert first.served >= 32 and late.served > 0 and first.served + late.served == 128


def test_an_engine_that_never_arrives_is_let_go_with_the_last_call() -> None:
    present, absent, hub = TimedEngine(0.01), TimedEngine(), Hub("present")
    spread({"present": present, "absent": absent}, members=hub)
    assert (present.served, absent.served) == (128, 0)
    assert hub.released[0] == "absent", "before the samples of the other are there"


def test_a_lost_engine_gives_its_calls_to_the_others() -> None:
    lost, other, hub = TimedEngine(0.002, die_after=3), TimedEngine(0.002), Hub("lost", "other")
    result = spread({"lost": lost, "other": other}, members=hub)
    assert result.score.avg_at_n == expected_average(small(16).items, 8)
    assert lost.served <= 3 and lost.served + other.served == 128
    asked = [request.seed for request in other.requests]
    assert len(set(asked)) == len(asked), "and each of them once"


def test_a_lost_engine_is_asked_again_only_when_it_holds_the_version_again() -> None:
    engine, hub, waits = TimedEngine(0.002, die_after=5), Hub("engine0"), []

    def note(nothing_runs: bool) -> None:
        waits.append(nothing_runs)
        if nothing_runs and not engine.healthy:
            engine.revive()  # its process is there again, with other weights
            hub.set()
            asyncio.get_running_loop().call_later(0.3, hub.set, "engine0")

    result = spread({"engine0": engine}, items=4, members=hub, on_waiting=note)
    assert len(result.samples) == 32 and engine.served == 32
    assert True in waits and waits[-1] is False


def test_an_engine_that_is_healthy_and_refuses_a_call_ends_the_evaluation_also_beside_others() -> None:
    class Picky(TimedEngine):
        async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
            if any(request.seed % 64 == 0 for request in requests):
                raise RunFailed("engine at nowhere answered /generate with 400: no")
            return await super().generate(requests)

    with pytest.raises(RunFailed, match="with 400"):
        spread({"engine0": Picky(), "engine1": Picky()}, items=64)


def test_requests_that_are_aborted_for_good_end_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_spread, "PATIENCE_S", 0.2)
    engine = FakeEngine()
    engine.aborts = 10**6
    with pytest.raises(RunFailed, match="engine0 aborted an evaluation request for"):
        run_benchmark(engine, small(1))


def test_a_fixed_split_depends_on_no_clock() -> None:
    calls = []
    for seconds in ((0.001, 0.01), (0.01, 0.001)):
        engines = {f"engine{i}": TimedEngine(s) for i, s in enumerate(seconds)}
        both = [small(5), replace(small(3), name="other")]
        found = run_benchmarks(engines, both, whole_calls=True, max_concurrency=16, grader=InstantGrader())
        assert [len(result.samples) for result in found] == [40, 24]
        assert [engine.most for engine in engines.values()] == [16, 16], "one call at a time"
        calls.append([[[r.seed for r in call] for call in engine.calls] for engine in engines.values()])
    assert calls[0] == calls[1]
    assert [[len(call) for call in of_engine] for of_engine in calls[0]] == [[16, 8, 8], [16, 16]]


def test_progress_speaks_of_the_first_benchmark_that_is_not_done() -> None:
    seen: list[tuple[str, int, int]] = []
    both = [small(5), replace(small(3), name="other")]
    note = lambda work: seen.append((work.benchmark.name, work.done, work.total))  # noqa: E731
    run_benchmarks({"engine0": FakeEngine()}, both, max_concurrency=8, on_progress=note, grader=InstantGrader())
    assert seen == [
        *(("arithmetic-heldout", done, 40) for done in (0, 8, 16, 24, 32)),
        *(("other", done, 24) for done in (0, 8, 16, 24)),
    ]


def test_benchmarks_share_the_engine_so_that_the_tail_of_one_holds_up_none() -> None:
    engine = TimedEngine(0.5)  # long enough that a busy machine asks for all before the first ends
    both = [small(1), replace(small(3), name="other")]
    run_benchmarks({"engine0": engine}, both, max_concurrency=32, grader=InstantGrader())
    assert engine.most == 32
