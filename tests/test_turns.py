"""A GPU that an engine and a trainer use in turns: the queue for it, the engine's side, the trainer's side."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine, FakeFetcher
from machines import facts
from test_hub_api import TOKEN, Server
from test_hub_store import open_store
from test_train_worker import Job, save_model

from astracli import backend, plan, plan_memory, recipe_io, registry
from astracli.engines.client import EngineClient, GenRequest
from astracli.hub.cards import CardBook
from astracli.hub.client import AsyncHubClient, HubClient
from astracli.recipe import Recipe
from astracli.workers.updates import Lane

GIB = 2**30


def test_a_card_has_one_holder_and_the_others_wait_in_order() -> None:
    book = CardBook(["engine0"])
    assert book.take("engine0", "engine0"), "an engine holds its card from the start"
    assert not book.wanted("engine0")
    assert not book.take("engine0", "trainer") and not book.take("engine0", "other")
    assert not book.take("engine0", "trainer"), "asking again keeps the place"
    assert book.wanted("engine0")
    book.give("engine0", "other")
    book.give("engine0", "engine0")
    assert not book.take("engine0", "engine0"), "who gave it stands behind those who wait"
    assert book.take("engine0", "trainer")
    book.forget("trainer")
    assert book.document() == {"engine0": {"holder": None, "waiting": ["engine0"]}}, "a dead holder frees it"
    assert book.take("engine0", "engine0")
    with pytest.raises(ValueError, match="no card `gpu7`"):
        book.take("gpu7", "trainer")


def test_the_hub_wakes_whoever_waits_for_a_card(tmp_path: Path) -> None:
    store = open_store(tmp_path, cards=["engine0"])
    server = Server(store, tmp_path)
    try:
        with HubClient(server.url, TOKEN) as hub:
            assert hub.target("engine0")["wanted"] is False
            asked: list[Any] = []
            ask = lambda: asked.append(hub.take_card("engine0", "trainer", wait_s=10.0))  # noqa: E731
            waiter = threading.Thread(target=ask, daemon=True)
            waiter.start()
            begun = time.monotonic()
            assert hub.target("engine0", wait_s=10.0)["wanted"] is True
            hub.give_card("engine0", "engine0")
            waiter.join(timeout=10.0)
            assert asked == [{"held": True, "stop": False}] and time.monotonic() - begun < 5.0
            store.release_worker("trainer")
            assert hub.take_card("engine0", "engine0")["held"], "the trainer died"
            assert hub.state()["cards"] == {"engine0": {"holder": "engine0", "waiting": []}}
    finally:
        server.thread.stop()


def test_an_engine_does_not_leave_while_an_evaluation_is_pinned_to_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, cards=["engine0"], eval_every=1)
    store.announce(0, 0)
    store.take_card("engine0", "trainer")
    assert store.target("engine0") == {"version": 0, "pinned": True, "wanted": False, "stop": False}
    store.eval_done(0, 0, {})
    assert store.target("engine0")["wanted"] is True


def test_the_engine_gives_its_memory_back_with_nothing_running_and_goes_on_afterwards(tmp_path: Path) -> None:
    engine = FakeEngine(TOKEN, length=400).start()
    store = open_store(tmp_path, cards=["engine0"])
    server = Server(store, tmp_path)

    async def play() -> list[Any]:
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(server.url, TOKEN))
            client = await stack.enter_async_context(EngineClient(engine.url, TOKEN))
            lane = Lane("engine0", client, hub, FakeFetcher(), process="rollout", ready_timeout_s=5.0, turns=True)
            following = asyncio.create_task(lane.follow())
            store.announce(0, 0)
            await lane.open.wait()
            request = GenRequest([5, 6], 400, stop_token_ids=(1,), seed=9)
            work = asyncio.create_task(lane.generate([request]))
            await asyncio.sleep(0.2)
            while not (await asyncio.to_thread(store.take_card, "engine0", "trainer"))["held"]:
                await asyncio.sleep(0.02)
            (part,) = await work
            assert engine.released == ["kv_cache", "weights"] and engine.running == 0 and not lane.open.is_set()
            await asyncio.sleep(0.2)
            assert engine.released, "it stays away until the trainer gives the card"
            store.announce(1, 1)
            store.give_card("engine0", "trainer")
            await lane.open.wait()
            assert engine.released == [] and lane.version == 1
            (rest,) = await lane.generate([GenRequest([5, 6], 20, stop_token_ids=(1,), seed=9)])
            store.request_stop()
            await following
            return [part, rest]

    try:
        part, rest = asyncio.run(asyncio.wait_for(play(), 30))
    finally:
        engine.stop()
        server.thread.stop()
    assert part.finish_reason == "abort" and 0 < len(part.tokens) < 400 and part.version == 0
    assert rest.version == 1
    assert engine.events == [
        "pause abort with 0 running",
        "released kv_cache weights",
        "resumed",
        "pause abort with 0 running",
        "applied 1",
    ]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


class Engine:
    """The engine's part as the hub sees it: gives its card when it is wanted, takes it back, remembers who had it."""

    def __init__(self, job: Job, loops: list[Any]):
        self.turns: list[int] = []
        self._over = threading.Event()
        self._job, self._loops = job, loops
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        store = self._job.store
        while not self._over.is_set():
            if store.target("engine0").get("wanted"):
                assert all(held(loop) == 0 for loop in self._loops), "the trainer asks before it comes back"
                store.give_card("engine0", "engine0")
                while not store.take_card("engine0", "engine0")["held"] and not self._over.is_set():
                    time.sleep(0.005)
                self.turns.append(sum(held(loop) for loop in self._loops))
            time.sleep(0.005)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)


def held(loop: Any) -> int:
    """Bytes of the trainer's state that are on its device."""
    masters = loop.trainer.masters
    tensors = [*masters.values.values(), *masters.parameters.values()]
    tensors += [s[k] for s in masters.adamw.state.values() for k in ("exp_avg", "exp_avg_sq")]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.fixture
def engine_url() -> Iterator[str]:
    engine = FakeEngine(TOKEN).start()
    yield engine.url
    engine.stop()


def test_a_trainer_in_turns_learns_the_same_and_is_away_between_its_steps(
    tmp_path: Path, model_dir: Path, engine_url: str
) -> None:
    values = []
    for cards in ([], ["engine0"]):
        job = Job(tmp_path / ("turns" if cards else "alone"), model_dir)
        job.store._cards = CardBook(cards)
        loops: list[Any] = []
        engine = Engine(job, loops)
        placement = {"shared": True, "cards": cards}
        engines = [{"name": "engine0", "url": engine_url, "stage_dir": str(tmp_path)}]
        try:
            loop = job.loop(extra={"placement": placement}, engines=engines)
            loops.append(loop)
            loop.start()
            job.train(loop)
            assert held(loop) == 0 if cards else held(loop) > 0
            loop.finish()
        finally:
            engine.stop()
            job.server.thread.stop()
        if cards:
            assert len(engine.turns) >= 6 and set(engine.turns) == {0}, "nothing of it is left in an engine's turn"
        loop.trainer.to_device()
        values.append({name: value.clone() for name, value in loop.trainer.masters.values.items()})
    assert all(torch.equal(values[0][name], value) for name, value in values[1].items())


def planned(recipe: Recipe, document: dict[str, Any]) -> plan.LaunchPlan:
    adapter = registry.resolve(recipe)
    return plan.build(recipe, adapter, backend.choose(adapter, document, recipe), document)


SHARED = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")


def test_turns_are_taken_where_the_two_do_not_fit_side_by_side() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", SHARED)
    result = planned(recipe, facts("9.0", 1, memory_gib=46, host_gib=512))
    plan.refuse(result)
    assert result.placement.turns and result.cards == ["engine0"]
    assert ("engine and trainer", "take turns") in [row[:2] for row in result.placement.reasons]
    assert plan_memory.on_gpu(result.memory, ["engine0", "trainer"], fixed=True) <= 46 * GIB
    assert plan_memory.total(result.memory, where="gpu") > 46 * GIB
    waiting = {
        row.what: row.bytes for row in result.memory if row.where == "host" and "in the other's turn" in row.what
    }
    assert waiting["master weights (fp32), in the other's turn"] == 4 * 4_205_751_296
    assert waiting["weights (bf16), in the other's turn"] == 2 * 4_205_751_296
    assert {process.restarts for process in result.processes} == {0}
    roomy = planned(recipe, facts("9.0", 1, memory_gib=141, host_gib=512))
    assert not roomy.placement.turns and roomy.cards == []
    asked = recipe_io.load("qwen3.5-4b-m2po-delta", (*SHARED, "resources.share_mode=turns"))
    assert planned(asked, facts("9.0", 1, memory_gib=141, host_gib=512)).placement.turns
    beside = recipe_io.load("qwen3.5-4b-m2po-delta", (*SHARED, "resources.share_mode=side_by_side"))
    with pytest.raises(plan.UserError, match="GPU 0 needs at least"):
        plan.refuse(planned(beside, facts("9.0", 1, memory_gib=46, host_gib=512)))
