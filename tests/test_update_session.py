"""Weight updates of SGLang servers that want them between begin and end, and of those that know no such routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from rollout_world import World, records, until
from test_hub_api import TOKEN

from astracli.engines.client import EngineClient
from astracli.engines.sglang.client import SglangClient
from astracli.errors import RunFailed

UPDATE, BEGIN, END = "/update_weights_from_tensor", "/begin_weight_update", "/end_weight_update"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    """Paused, and wants begin and end."""
    made = FakeEngine(TOKEN, update_session=True, paused=True, stage_dir=tmp_path).start()
    yield made
    made.stop()


def run_client(engine: FakeEngine, scenario: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with SglangClient(engine.url, TOKEN, stage_dir=engine.stage_dir) as client, asyncio.timeout(60):
            await scenario(client)

    asyncio.run(run())


@pytest.mark.parametrize("update_session", [False, True])
@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_update_is_begun_and_ended_inside_the_pause_where_the_server_wants_that(
    tmp_path: Path, mode: str, update_session: bool
) -> None:
    world = World(tmp_path, update_session=update_session, stage_dir=tmp_path)
    try:

        async def scenario() -> None:
            await until(lambda: world.engine.running == 8)
            world.store.announce(1, 1)
            await until(lambda: records(world))

        asyncio.run(world.play(scenario, weights={"pause_mode": mode}))
    finally:
        world.close()
    paused, *rest = world.engine.events
    assert paused.startswith(f"pause {mode}")
    assert rest == (["begun", "applied -1", "ended", "called 1"] if update_session else ["applied -1", "called 1"])
    (record,) = records(world)
    assert (record["step"], record["resyncs"], record["apply_s"]) == (1, 0, 0.001)
    assert ("begin_s" in record, "end_s" in record) == (update_session, update_session)
    if update_session:
        assert 0 < record["begin_s"] + record["end_s"] < record["pause_s"]


def test_a_refused_update_is_ended_before_it_is_repeated_in_full(tmp_path: Path) -> None:
    world = World(tmp_path, update_session=True, stage_dir=tmp_path, refusals=1)
    try:

        async def scenario() -> None:
            await until(lambda: world.engine.running == 8)
            world.store.announce(1, 1)
            await until(lambda: records(world))

        asyncio.run(world.play(scenario))
    finally:
        world.close()
    steps = [event for event in world.engine.events if "pause" not in event]
    assert steps == ["begun", "refused -1", "ended", "begun", "applied -1", "ended", "called 1"]
    assert records(world)[0]["resyncs"] == 1


def test_an_update_that_breaks_off_is_ended_and_its_own_error_is_told(engine: FakeEngine) -> None:
    engine.broken = [UPDATE]

    async def scenario(client: EngineClient) -> None:
        with pytest.raises(RunFailed, match=f"answered {UPDATE} with 500: broken"):
            await client.apply_staged(1)
        assert engine.events == ["begun", "ended"]
        assert (await client.apply_staged(1)).success

    run_client(engine, scenario)


def test_an_update_whose_client_is_cancelled_is_ended(engine: FakeEngine) -> None:
    engine.update_s = 0.2

    async def scenario(client: EngineClient) -> None:
        task = asyncio.create_task(client.apply_staged(1))
        await until(lambda: engine.begun)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.begun and "called 1" not in engine.events

    run_client(engine, scenario)


def test_an_end_that_fails_leaves_the_weights_unproven_and_the_next_update_mends_it(engine: FakeEngine) -> None:
    engine.broken = [END, UPDATE]

    async def scenario(client: EngineClient) -> None:
        with pytest.raises(RunFailed, match=UPDATE):
            await client.apply_staged(1)
        assert engine.begun, "neither the update nor the end went through"
        engine.events.clear()
        assert (await client.apply_staged(1)).success
        assert engine.events == ["ended", "begun", "applied -1", "ended", "called 1"]
        engine.broken, engine.events = [END], []
        with pytest.raises(RunFailed, match=END):
            await client.apply_staged(1)
        assert engine.events == ["begun", "applied -1"] and engine.version == -1

    run_client(engine, scenario)


def test_a_server_that_will_not_begin_is_a_failed_update(engine: FakeEngine) -> None:
    engine.sticky, engine.begun = True, True

    async def scenario(client: EngineClient) -> None:
        update = await client.apply_staged(1)
        assert not update.success and "already open" in update.message
        assert engine.events == ["ended"]

    run_client(engine, scenario)


def test_waiting_for_a_read_back_is_begun_and_ended_too(engine: FakeEngine) -> None:
    async def scenario(client: EngineClient) -> None:
        await client.settle()
        assert engine.events == ["begun", "settled", "ended"]
        engine.sticky, engine.begun = True, True
        with pytest.raises(RunFailed, match=r"does not settle: .* already open"):
            await client.settle()

    run_client(engine, scenario)


def test_what_the_server_wants_is_learned_anew_when_it_comes_back(tmp_path: Path) -> None:
    old = FakeEngine(TOKEN, paused=True, stage_dir=tmp_path).start()
    new = FakeEngine(TOKEN, update_session=True, paused=True, stage_dir=tmp_path, port=old.port)

    async def scenario(client: EngineClient) -> None:
        await client.wait_ready(5.0)
        assert (await client.apply_staged(1)).success
        await asyncio.to_thread(old.stop)
        await asyncio.to_thread(new.start)
        await client.wait_ready(5.0)
        assert (await client.apply_staged(1)).success

    run_client(old, scenario)
    new.stop()
    assert old.events == ["applied -1", "called 1"]
    assert new.events == ["begun", "applied -1", "ended", "called 1"]
