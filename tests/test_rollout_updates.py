"""Weight updates under a working rollout worker: segments, failures, engines that come back, pins."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_world import World, expected, records, until, world

from astracli.engines.client import EngineClient
from astracli.errors import RunFailed
from astracli.hub.types import EngineReport
from astracli.rl.types import Group

__all__ = ["world"]


def test_an_update_ends_segments_and_the_continuation_equals_an_uncut_completion(world: World) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        await asyncio.sleep(0.06)
        world.store.announce(1, 1)
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario, weights={"pause_mode": "abort"}))
    assert world.engine.events == ["pause abort with 0 running", "applied 1"]
    assert world.fetcher.asked == [(1, 0)]
    cut = [sample for group in got for sample in group.samples if len(sample.segments) == 2]
    assert len(cut) >= 8, "everything that ran at the update has two segments"
    for group in got:
        for sample in group.samples:
            assert sample.tokens.tolist() == expected(group.lease_id, sample.index)
            assert np.array_equal(sample.logprobs, -1.0 - sample.versions), "the version of each token is its own"
    (record,) = records(world)
    assert record["step"] == 1 and record["resyncs"] == 0 and record["kind"] == "delta"
    assert record["aborted_samples"] == 8 and record["prefilled_again_tokens"] > 8 * 4
    assert 0 < record["pause_s"] <= record["gap_s"] < 1.0
    assert world.store.state().engines["engine0"] == EngineReport(1, "ready")


@pytest.mark.parametrize("foreign", [False, True], ids=["embedded", "sglang"])
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_requests_kept_through_an_update_count_as_the_oldest_version(
    world: World, tmp_path: Path, mode: str, foreign: bool
) -> None:
    got: list[Group] = []
    world.engine.stage_dir = tmp_path if foreign else None

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        await asyncio.sleep(0.05)
        world.store.announce(1, 1)
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario, weights={"pause_mode": mode}))
    applied = ["applied -1", "called 1"] if foreign else ["applied 1"]
    assert world.engine.events == [f"pause {mode} with 8 running", *applied]
    kept = [sample for group in got[:2] for sample in group.samples]
    assert [len(sample.segments) for sample in kept] == [1] * 8
    assert all(sample.versions.max() == 0 and sample.logprobs.min() == -2.0 for sample in kept)
    assert [record["aborted_samples"] for record in records(world)] == [0]


def test_a_failed_update_is_repeated_in_full_and_serves_nothing_in_between(world: World) -> None:
    world.engine.refusals = 1

    async def scenario() -> None:
        await until(lambda: world.engine.running)
        world.store.announce(1, 1)
        await world.batch(0)
        await until(lambda: world.store.state().engines["engine0"].version == 1)

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, None)]
    assert [event for event in world.engine.events if "pause" not in event] == ["refused 1", "applied 1"]
    (record,) = records(world)
    assert (record["resyncs"], record["kind"], record["changed"], record["apply_s"]) == (1, "full", 7, 0.001)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_what_a_failed_update_found_running_is_ended_and_asked_anew(world: World, mode: str) -> None:
    world.engine.refusals, world.engine.update_s = 1, 0.1
    got: list[Group] = []

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        world.store.announce(1, 1)
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario, weights={"pause_mode": mode}))
    assert world.engine.events[:2] == [f"pause {mode} with 8 running", "refused 1"]
    assert world.engine.events[2:] == [f"pause {mode} with 0 running", "applied 1"]
    samples = [sample for group in got for sample in group.samples]
    assert {float(value) for sample in samples for value in sample.logprobs} == {-2.0}, "drawn by version 1 alone"
    assert all(sample.tokens.tolist() == expected(g.lease_id, sample.index) for g in got for sample in g.samples)
    (record,) = records(world)
    assert record["gap_s"] > record["pause_s"] > 0.1, "closed from the failure on, while the full payload came"


@pytest.mark.parametrize("held", [0, -1])
def test_an_engine_in_which_our_loader_never_ran_is_woken_before_the_first_update(world: World, held: int) -> None:
    """Also one whose weights are made up: version 0 is then staged beside it like every other."""
    world.fetcher.watched, world.engine.version = False, held

    async def scenario() -> None:
        await until(lambda: world.engine.running or held < 0)
        world.store.announce(1, 1)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario))
    assert world.fetcher.woken == [held] and world.fetcher.asked == [(1, 0 if held == 0 else None)]
    assert [event for event in world.engine.events if "pause" not in event] == [f"applied {held}", "applied 1"]


def test_what_is_generated_before_a_read_back_fails_is_lost_and_the_engine_resynced(world: World) -> None:
    world.engine.readbacks, world.engine.update_s = True, 0.1
    world.fetcher.readbacks = [RunFailed("read back under HF names, 1 tensors differ: a"), 0.01]

    async def scenario() -> None:
        world.store.announce(1, 1)
        for group in await world.batch(0):
            for sample in group.samples:
                assert sample.tokens.tolist() == expected(group.lease_id, sample.index)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, None)]
    assert [event for event in world.engine.events if "pause" not in event] == ["applied 1", "applied 1"]
    (record,) = records(world)
    assert (record["resyncs"], record["kind"], record["readback_s"]) == (1, "full", 0.01)
    assert record["gap_s"] > 0.1, "closed from the failure on, while the full payload came"


def test_an_engine_that_is_lost_after_a_failed_read_back_is_not_taken_at_its_word(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it holds the version; SGLang, too, goes on saying so."""
    world.engine.readbacks = True
    world.fetcher.readbacks = [RunFailed("read back under HF names, 1 tensors differ: a"), 0.01]
    pause, pauses = EngineClient.pause, []

    async def lost_once(client: EngineClient, mode: Any) -> None:
        pauses.append(mode)
        if len(pauses) == 2:
            raise RunFailed("engine0 did not answer")
        await pause(client, mode)

    monkeypatch.setattr(EngineClient, "pause", lost_once)

    async def scenario() -> None:
        world.store.announce(1, 1)
        await until(lambda: world.store.state().engines.get("engine0") == EngineReport(1, "ready"))

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, None), (1, None)]
    assert [event for event in world.engine.events if "pause" not in event] == ["applied 1", "applied 1"]


def test_what_comes_back_before_the_engine_has_said_that_it_goes_on_waits_for_the_readback(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, readback, counted = EngineClient.resume, world.fetcher.readback, []

    async def slowly(client: EngineClient) -> None:
        await resume(client)
        await asyncio.sleep(0.4)  # twice as long as a completion takes

    def counting(version: int) -> dict[str, float]:
        counts = world.store.state().counts
        counted.append(counts.waiting + counts.dropped)
        return readback(version)

    monkeypatch.setattr(EngineClient, "resume", slowly)
    monkeypatch.setattr(world.fetcher, "readback", counting)
    world.engine.readbacks = True
    world.fetcher.readbacks = [RunFailed("read back under HF names, 1 tensors differ: a"), 0.01]

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        world.store.announce(1, 1)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario))
    assert counted == [0, 0], "nothing that the wrong weights drew"


def readback_on_demand(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(a read-back is asked for, it may be answered)"""
    asked, go_on, readback = threading.Event(), threading.Event(), world.fetcher.readback

    def slowly(version: int) -> dict[str, float]:
        asked.set()
        assert go_on.wait(60)
        return readback(version)

    monkeypatch.setattr(world.fetcher, "readback", slowly)
    return asked, go_on


def test_no_evaluation_begins_before_the_weights_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are not held back: of weights that are then found wrong they would be counted."""
    world = World(tmp_path, {"eval_every": 1})
    world.engine.readbacks = True
    world.fetcher.readbacks = [RunFailed("read back under HF names, 1 tensors differ: a"), 0.01]
    asked, go_on = readback_on_demand(world, monkeypatch)

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        world.store.announce(1, 1)
        await until(asked.is_set)
        await asyncio.sleep(0.05)
        assert "to hold version 1" in world.store.eval_next().wait
        assert world.fetcher.asked == [(1, 0)]
        go_on.set()
        await until(lambda: world.store.eval_next().evaluation)
        assert world.fetcher.asked == [(1, 0), (1, None)], "in full, and proven, before it began"
        assert world.store.eval_next().evaluation.version == 1
        world.store.eval_done(1, 1, {})

    asyncio.run(world.play(scenario))


def test_an_update_that_fails_twice_ends_the_run_in_words(world: World) -> None:
    world.engine.refusals = 2

    async def scenario() -> None:
        world.store.announce(1, 1)
        await asyncio.sleep(10)

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(world.play(scenario))
    (failure,) = error.value.exceptions
    assert isinstance(failure, RunFailed)
    assert failure.message == (
        "engine0 could not be brought to version 1: version 1 was not applied: digest of lm_head differs; "
        "then, with a full payload: version 1 was not applied: digest of lm_head differs"
    )


def test_a_pinned_engine_stays_until_the_evaluation_is_done(tmp_path: Path) -> None:
    world = World(tmp_path, {"eval_every": 100}, step_s=0.001)  # an evaluation at step 0

    async def scenario() -> None:
        world.store.announce(0, 0)
        await world.batch(0)
        world.store.announce(1, 1)
        await world.batch(1)
        await asyncio.sleep(0.2)
        assert world.engine.events == [], "pinned: no update, and rollouts went on at the pinned version"
        wait = world.store.lease("x", 1, engine="engine0").wait
        assert wait is not None and "it is 2 versions behind the next batch" in wait
        world.store.eval_done(0, 0, {})
        await until(lambda: bool(records(world)))
        (record,) = records(world)
        assert 0.1 < record["held_idle_s"] <= record["idle_s"], "nothing could be granted at the pinned version"
        await until(lambda: world.store.counts().in_flight + world.store.counts().waiting)

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()


def test_an_engine_that_comes_back_is_given_weights_before_it_serves(world: World) -> None:
    async def scenario() -> None:
        world.store.announce(0, 0)
        await world.batch(0)
        world.store.announce(1, 1)
        await until(lambda: world.engine.version == 1 and world.engine.running)
        await asyncio.to_thread(world.engine.stop)
        await until(lambda: world.store.counts().queued > 0)
        world.engine.version, world.engine.serving, world.engine.running = 0, False, 0
        world.engine.start()
        await world.batch(1)

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, 0)]
    assert world.engine.version == 1


def test_an_engine_that_is_lost_during_its_read_back_and_comes_back_gets_work_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its read-back never comes; it is resynced and then attached: only after that the hub hears that it is ready."""
    world.engine.readbacks = True
    world.fetcher.readbacks = [RunFailed("the engine did not read version 1 back within 60 s"), 0.01, 0.01, 0.01]
    asked, go_on = readback_on_demand(world, monkeypatch)

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        world.store.announce(1, 1)
        await until(asked.is_set)
        assert world.engine.running
        world.engine.step_s = 0.2  # so that what runs is cut off
        await asyncio.to_thread(world.engine.stop)
        await until(lambda: world.store.counts().queued > 0)
        world.engine.version, world.engine.serving, world.engine.running, world.engine.step_s = 0, False, 0, 0.01
        world.engine.start()
        go_on.set()
        await until(lambda: bool(records(world)))
        await world.batch(0)
        await until(lambda: world.store.state().engines["engine0"] == EngineReport(1, "ready"))

    asyncio.run(world.play(scenario))


def test_an_engine_that_is_lost_while_it_has_nothing_to_do_is_given_weights_when_it_comes_back(world: World) -> None:
    """Without a request and an update nothing fails here: only the supervisor sees it, and says so to the hub."""

    async def scenario() -> None:
        world.store.announce(1, 1)
        await until(lambda: world.store.state().engines.get("engine0") == EngineReport(1, "ready"))
        await world.batch(0)
        await until(lambda: world.store.lease("x", 0, engine="engine0").wait)
        await until(lambda: not world.store.counts().in_flight)
        asked = len(world.fetcher.asked)
        await asyncio.to_thread(world.engine.stop)
        world.engine.version, world.engine.serving = 0, False
        world.store.release_worker("engine0")
        world.engine.start()
        await until(lambda: world.store.state().engines["engine0"] == EngineReport(1, "ready"))
        assert len(world.fetcher.asked) == asked + 1

    asyncio.run(world.play(scenario))
    assert world.engine.version == 1 and world.engine.serving
