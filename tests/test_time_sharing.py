"""A GPU that an engine and a trainer share in time: the queue for it, the engine's side, the trainer's side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import configs
import pytest
import torch
import warm
from fake_engine import FakeEngine, FakeFetcher
from hub_tools import open_store
from machines import facts
from test_hub_api import TOKEN, Server
from trainer_job import STEPS, Job
from training_tools import save_model

from astracli.backends import choice as backend
from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.engines.contract import GenRequest
from astracli.engines.sglang.client import SglangClient
from astracli.errors import UserError
from astracli.hub.client import AsyncHubClient, HubClient
from astracli.hub.gpu_leases import GpuLeases
from astracli.hub.types import GpuLeaseReply, GpuLeaseStatus, Target
from astracli.launch import summary
from astracli.machine.facts import validate
from astracli.models import registry
from astracli.plan import build as plan
from astracli.plan import memory as plan_memory
from astracli.plan.seats import GpuId
from astracli.plan.types import LaunchPlan
from astracli.plan.view import what
from astracli.process.config import EngineAddress
from astracli.process.ports import free_ports
from astracli.rollout.engine_worker import EngineWorker
from astracli.runs import metrics
from astracli.weights.format.manifest import read_stable

GIB = 2**30
LEAVING_S = 0.1


def test_a_gpu_lease_has_one_holder_and_the_others_wait_in_order() -> None:
    book = GpuLeases(["engine0"])
    assert book.take("engine0", "engine0"), "an engine holds its lease from the start"
    assert not book.wanted("engine0")
    assert not book.take("engine0", "trainer") and not book.take("engine0", "other")
    assert not book.take("engine0", "trainer"), "asking again keeps the place"
    assert book.wanted("engine0")
    book.give("engine0", "other")
    book.give("engine0", "engine0")
    assert not book.take("engine0", "engine0"), "who gave it stands behind those who wait"
    assert book.take("engine0", "trainer")
    book.forget("trainer")
    assert book.document() == {"engine0": GpuLeaseStatus(None, ["engine0"])}, "a dead holder frees it"
    assert book.take("engine0", "engine0")
    with pytest.raises(ValueError, match="no GPU lease `gpu7`"):
        book.take("gpu7", "trainer")


def test_the_hub_wakes_whoever_waits_for_a_gpu_lease(tmp_path: Path) -> None:
    store = open_store(tmp_path, gpu_leases=["engine0"])
    server = Server(store, tmp_path)
    try:
        with HubClient(server.url, TOKEN) as hub:
            assert hub.target("engine0").wanted is False
            asked: list[Any] = []
            ask = lambda: asked.append(hub.take_gpu_lease("engine0", "trainer", wait_s=10.0))  # noqa: E731
            waiter = threading.Thread(target=ask, daemon=True)
            waiter.start()
            begun = time.monotonic()
            assert hub.target("engine0", wait_s=10.0).wanted is True
            hub.give_gpu_lease("engine0", "engine0")
            waiter.join(timeout=60.0)
            assert asked == [GpuLeaseReply(True, False)] and time.monotonic() - begun < 8.0
            store.release_worker("trainer")
            assert hub.take_gpu_lease("engine0", "engine0").held, "the trainer died"
            assert hub.state().gpu_leases == {"engine0": GpuLeaseStatus("engine0", [])}
    finally:
        server.thread.stop()


def test_an_engine_does_not_leave_while_an_evaluation_is_pinned_to_it(tmp_path: Path) -> None:
    store = open_store(tmp_path, gpu_leases=["engine0"], eval_every=1)
    store.announce(0, 0)
    store.take_gpu_lease("engine0", "trainer")
    assert store.target("engine0") == Target(0, True, False, False, False)
    store.eval_done(0, 0, {})
    assert store.target("engine0").wanted is True


@pytest.mark.parametrize("update_session", [False, True])
def test_the_engine_gives_its_memory_back_with_nothing_running_and_goes_on_afterwards(
    tmp_path: Path, update_session: bool
) -> None:
    engine = FakeEngine(
        TOKEN, length=400, stage_dir=tmp_path, results=[{"version": 1}], update_session=update_session
    ).start()
    store = open_store(tmp_path, gpu_leases=["engine0"])
    server = Server(store, tmp_path)

    async def play() -> list[Any]:
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(server.url, TOKEN))
            client = await stack.enter_async_context(SglangClient(engine.url, TOKEN, stage_dir=tmp_path))
            worker = EngineWorker(
                "engine0", client, hub, FakeFetcher(), process="rollout", ready_timeout_s=60.0, time_sharing=True
            )
            following = asyncio.create_task(worker.follow())
            store.announce(0, 0)
            await worker.gate.wait()
            request = GenRequest([5, 6], 400, stop_token_ids=(1,), seed=9)
            work = asyncio.create_task(worker.generate([request]))
            await asyncio.sleep(0.2)
            while not (await asyncio.to_thread(store.take_gpu_lease, "engine0", "trainer")).held:
                await asyncio.sleep(0.02)
            (part,) = await work
            assert engine.released == ["kv_cache", "weights"] and engine.running == 0 and not worker.gate.is_set()
            await asyncio.sleep(0.2)
            assert engine.released, "it stays away until the trainer gives the lease"
            store.announce(1, 1)
            store.give_gpu_lease("engine0", "trainer")
            await worker.gate.wait()
            assert engine.released == [] and worker.version == 1
            (rest,) = await worker.generate([GenRequest([5, 6], 20, stop_token_ids=(1,), seed=9)])
            store.request_stop()
            await following
            return [part, rest]

    try:
        part, rest = asyncio.run(asyncio.wait_for(play(), 120))
    finally:
        engine.stop()
        server.thread.stop()
    assert part.finish_reason == "abort" and 0 < len(part.tokens) < 400 and part.version == 0
    assert rest.version == 1
    begun, ended = (["begun"], ["ended"]) if update_session else ([], [])
    assert engine.events == [
        "pause abort with 0 running",
        *begun,
        "settled",
        *ended,
        "released kv_cache weights",
        "resumed",
        "pause abort with 0 running",
        *begun,
        "applied -1",
        *ended,
        "called 1",
    ]


def test_lending_before_the_first_version_names_no_step(tmp_path: Path) -> None:
    """The trainer has the GPU first: it makes version 0. Whoever sums up a run compares steps with integers."""
    engine = FakeEngine(TOKEN, length=4, stage_dir=tmp_path, results=[{"version": 0}]).start()
    store = open_store(tmp_path, gpu_leases=["engine0"])
    server = Server(store, tmp_path)

    async def play() -> None:
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(server.url, TOKEN))
            client = await stack.enter_async_context(SglangClient(engine.url, TOKEN, stage_dir=tmp_path))
            worker = EngineWorker(
                "engine0", client, hub, FakeFetcher(), process="rollout", ready_timeout_s=60.0, time_sharing=True
            )
            engine.version = -1
            following = asyncio.create_task(worker.follow())
            for version in range(2):
                while not (await asyncio.to_thread(store.take_gpu_lease, "engine0", "trainer")).held:
                    await asyncio.sleep(0.02)
                store.announce(version, version)
                store.give_gpu_lease("engine0", "trainer")
                await worker.gate.wait()
            store.request_stop()
            await following

    try:
        asyncio.run(asyncio.wait_for(play(), 120))
    finally:
        engine.stop()
        server.thread.stop()
    told = [r for r in metrics.read(tmp_path / "metrics.jsonl") if "release_s" in r]
    assert ["step" in r for r in told] == [False, True]
    assert summary.training(told, 0)["step_s_p50"] is None, "a run's summary reads them"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


class Engine:
    """The engine's part as the hub sees it: gives its lease when it is wanted, takes it back, remembers who had it."""

    def __init__(self, job: Job, loops: list[Any]):
        self.time_sharing: list[int] = []
        self._over = threading.Event()
        self._job, self._loops = job, loops
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        store = self._job.store
        while not self._over.is_set():
            if store.target("engine0").wanted:
                assert all(held(loop) == 0 for loop in self._loops), "the trainer asks before it comes back"
                store.give_gpu_lease("engine0", "engine0")
                while not store.take_gpu_lease("engine0", "engine0").held and not self._over.is_set():
                    time.sleep(0.005)
                self.time_sharing.append(sum(held(loop) for loop in self._loops))
            time.sleep(0.005)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)


def held(loop: Any) -> int:
    """Bytes of the trainer's state that are on its device."""
    masters = loop.trainer.masters
    tensors = [*masters.values.values(), *masters.parameters.values()]
    tensors += [s[k] for s in masters.adam.adamw.state.values() for k in ("exp_avg", "exp_avg_sq")]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.fixture
def engine_url() -> Iterator[str]:
    engine = FakeEngine(TOKEN).start()
    yield engine.url
    engine.stop()


def slowly(work: Callable[[], None]) -> Callable[[], None]:
    def slow() -> None:
        time.sleep(LEAVING_S)
        work()

    return slow


def test_a_time_sharing_trainer_learns_the_same_and_is_away_between_its_steps(
    tmp_path: Path, model_dir: Path, engine_url: str
) -> None:
    values = []
    for gpu_leases in ([], ["engine0"]):
        job = Job(tmp_path / ("time_sharing" if gpu_leases else "alone"), model_dir, gpu_leases)
        job.background = "on"  # on a GPU it is; with time sharing nothing may run beside the engine
        loops: list[Any] = []
        engine = Engine(job, loops)
        engines = (EngineAddress(name="engine0", url=engine_url, stage_dir=tmp_path),)
        try:
            loop = job.loop(shared=True, gpu_leases=tuple(gpu_leases), leaves=True, engines=engines)
            loops.append(loop)
            loop.trainer.to_host = slowly(loop.trainer.to_host)
            loop.start()
            job.train(loop)
            assert held(loop) == 0 if gpu_leases else held(loop) > 0
            loop.finish()
        finally:
            engine.stop()
            job.server.thread.stop()
        if gpu_leases:
            for r in job.records():
                assert "loss" not in r or r["step_s"] > r["wait_s"] + r["train_s"] + LEAVING_S, "leaving is part of it"
            assert len(engine.time_sharing) >= 6 and set(engine.time_sharing) == {0}, (
                "nothing of it is left while an engine has the GPU"
            )
        loop.trainer.to_device()
        values.append({name: value.clone() for name, value in loop.trainer.masters.values.items()})
    assert all(torch.equal(values[0][name], value) for name, value in values[1].items())


def test_two_ranks_share_the_first_ones_gpu_with_an_engine(tmp_path: Path, model_dir: Path, engine_url: str) -> None:
    """Two real processes; only rank 0 shares its GPU. Start, every step and the export each take the lease once."""
    job = Job(tmp_path, model_dir, ["engine0"])
    engines = (EngineAddress(name="engine0", url=engine_url, stage_dir=tmp_path),)
    (port,) = free_ports(1, "127.0.0.1")
    ranks = []
    for rank, name in enumerate(("trainer", "trainer1")):
        config = job.config(name=name, engines=engines, shared=True, gpu_leases=("engine0",), leaves=rank == 0)
        path = tmp_path / f"{name}.json"
        path.write_text(config.model_dump_json())
        meet = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["-m", "astracli.training.worker", str(path)]
        ranks.append(warm.start(words, tmp_path / f"{name}.log", env=os.environ | meet))
    engine = Engine(job, [])
    try:
        for version in range(STEPS):
            deadline = time.monotonic() + 60
            while job.store.target("engine0").version != version and all(r.poll() is None for r in ranks):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            job.roll(version)
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0], (tmp_path / "trainer.log").read_text()
    finally:
        engine.stop()
        job.server.thread.stop()
        for rank in ranks:
            warm.end(rank)
    assert len(engine.time_sharing) == STEPS + 2
    assert read_stable(job.run_dir / "weights", STEPS)["manifests"].keys() == {"delta"}
    assert (job.run_dir / "export" / "config.json").is_file()
    losses = [r["loss"] for r in job.records() if "loss" in r]
    alone = Job(tmp_path / "alone", model_dir)
    loop = alone.loop()
    loop.start()
    alone.train(loop)
    alone.server.thread.stop()
    expected = [r["loss"] for r in alone.records() if "loss" in r]
    assert len(losses) == STEPS and losses[:2] == pytest.approx(expected[:2], rel=1e-3, abs=1e-5)


def planned(recipe: Recipe, document: dict[str, Any]) -> LaunchPlan:
    adapter = registry.resolve(recipe)
    there = validate(document)
    return plan.build(recipe, adapter, backend.choose(adapter, there, recipe), there)


SHARED = ("resources.rollout_gpus=1", "resources.train_gpus=1", "resources.share_gpus=true")


def test_time_sharing_where_the_two_do_not_fit_side_by_side() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", SHARED)
    result = planned(recipe, facts("9.0", 1, memory_gib=46, host_gib=512))
    plan.refuse(result)
    assert result.placement.time_sharing and result.gpu_leases == ["engine0"]
    assert ("engine and trainer", "time sharing") in [row[:2] for row in result.placement.reasons]
    assert plan_memory.on_gpu(result.memory, ["engine0", "trainer"], fixed=True) <= 46 * GIB
    assert plan_memory.total(result.memory, where="gpu") > 46 * GIB
    waiting = {what(row): row.bytes for row in result.memory if row.where == "host" and "while offloaded" in what(row)}
    assert waiting["master weights (fp32), while offloaded"] == 4 * 4_205_751_296
    assert waiting["weights (bf16), while offloaded"] == 2 * 4_205_751_296
    assert {process.restarts for process in result.processes} == {0}
    roomy = planned(recipe, facts("9.0", 1, memory_gib=141, host_gib=512))
    assert not roomy.placement.time_sharing and roomy.gpu_leases == []
    asked = recipe_io.load("qwen3.5-4b-m2po-delta", (*SHARED, "resources.share_mode=time_sharing"))
    assert planned(asked, facts("9.0", 1, memory_gib=141, host_gib=512)).placement.time_sharing
    beside = recipe_io.load("qwen3.5-4b-m2po-delta", (*SHARED, "resources.share_mode=side_by_side"))
    with pytest.raises(UserError, match="GPU 0 needs at least"):
        plan.refuse(planned(beside, facts("9.0", 1, memory_gib=46, host_gib=512)))


ONE_AND_TWO = ("resources.rollout_gpus=1", "resources.train_gpus=2", "resources.share_gpus=true")


def test_one_engine_beside_a_trainer_on_two_gpus_shares_the_first() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", (*ONE_AND_TWO, "resources.share_mode=time_sharing"))
    document = facts("9.0", 2, memory_gib=46, host_gib=512)
    result = planned(recipe, document)
    plan.refuse(result)
    assert result.gpu_map == {GpuId(0): ["engine0", "trainer"], GpuId(1): ["trainer1"]} and result.gpu_leases == [
        "engine0"
    ]
    told = configs.of_plan(recipe, result)
    assert told["engine0"].time_sharing and told["rollout"].gpu_leases == ("engine0",)
    assert [told[name].leaves for name in ("trainer", "trainer1")] == [True, False]
    assert all(told[name].gpu_leases == ("engine0",) for name in ("trainer", "trainer1"))
    away = {row.process for row in result.memory if row.away}
    assert away == {"engine0", "trainer"}, "the second rank stays where it is"
    assert plan_memory.on_gpu(result.memory, ["engine0", "trainer"], fixed=True) <= 46 * GIB
    waiting = [row for row in result.memory if what(row) == "master weights (fp32), while offloaded"]
    assert [(row.process, row.bytes) for row in waiting] == [("trainer", 2 * 4_205_751_296)]
    roomy = planned(recipe_io.load("qwen3.5-4b-m2po-delta", ONE_AND_TWO), facts("9.0", 2, memory_gib=141, host_gib=512))
    plan.refuse(roomy)
    assert roomy.placement.shared and not roomy.placement.time_sharing


def test_an_engine_and_a_trainer_on_a_gpu_each_share_nothing() -> None:
    recipe = recipe_io.load("qwen3.5-4b-m2po-delta", ("resources.rollout_gpus=1", "resources.train_gpus=1"))
    result = planned(recipe, facts("9.0", 2, memory_gib=141, host_gib=512))
    plan.refuse(result)
    assert result.gpu_map == {GpuId(0): ["engine0"], GpuId(1): ["trainer"]}
    assert result.gpu_leases == [] and not result.placement.shared
    env = {p.name: p.env["CUDA_VISIBLE_DEVICES"] for p in result.processes}
    assert env == {"engine0": "0", "rollout": "", "trainer": "1", "eval": ""}
    with pytest.raises(UserError, match="GPU 1 needs at least"):
        plan.refuse(planned(recipe, facts("9.0", 2, memory_gib=36, host_gib=512)))
