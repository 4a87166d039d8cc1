"""The rollout worker against a real hub and a small engine on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeFetcher, token
from hub_tools import open_store
from test_hub_api import TOKEN, Server

from astracli.data.prompts import PromptSource
from astracli.engines.client import EngineClient
from astracli.errors import RunFailed
from astracli.hub.client import AsyncHubClient
from astracli.hub.store import HubStore
from astracli.recipe import Recipe
from astracli.rl.reward import Grade, GradeItem
from astracli.rl.schedule import sample_seed
from astracli.rl.types import Group, unpack_group
from astracli.workers.common import Reporter, WorkerConfig
from astracli.workers.rollout import Rollout
from astracli.workers.updates import Lane

LENGTH = 20


class Tokenizer:
    """Characters as tokens."""

    chat_template = None
    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t) for t in tokens if t != 1)


class Grader:
    """Right for every even sample of a group."""

    async def agrade_group(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [Grade(float(i % 2 == 0), "right" if i % 2 == 0 else "wrong") for i in range(len(items))]


def recipe(**tables: Any) -> Recipe:
    document: dict[str, Any] = {
        "seed": 5,
        "model": {"path": "none"},
        "data": {"source": "arithmetic"},
        "rollout": {"group_size": 4, "max_new_tokens": 64, "context_length": 256, "max_running_requests": 8},
        "train": {"steps": 6, "batch_groups": 4, "max_staleness": 1},
    }
    for name, table in tables.items():
        document[name] = document.get(name, {}) | table
    return Recipe.model_validate(document)


class World:
    """A hub, an engine and a worker's parts; `play` runs the worker beside a scenario."""

    def __init__(self, path: Path, **engine: Any):
        self.path = path
        self.engine = FakeEngine(TOKEN, length=LENGTH, **engine).start()
        self.others: list[FakeEngine] = []
        self.fetcher = FakeFetcher()
        self.server = Server(open_store(path, steps=6), path)

    @property
    def store(self) -> HubStore:
        return self.server.store

    def close(self) -> None:
        self.server.thread.stop()
        for engine in [self.engine, *self.others]:
            engine.stop()

    def config(self, **changes: Any) -> WorkerConfig:
        engines = [{"name": "engine0", "url": self.engine.url}]
        extra = changes.pop("extra", {})
        return WorkerConfig(
            "rollout",
            "rollout",
            self.path,
            self.server.url,
            TOKEN,
            recipe(**changes),
            {"model": str(self.path)},
            engines,
            extra=extra,
        )

    async def play(self, scenario: Callable[[], Awaitable[None]] | None = None, **changes: Any) -> None:
        """Until the worker ends; the scenario requests the stop when it is through."""
        config = self.config(**changes)
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(config.hub_url, TOKEN))
            lanes = []
            for number, fake in enumerate([self.engine, *self.others]):
                engine = await stack.enter_async_context(EngineClient(fake.url, TOKEN))
                mode, name = config.recipe.weights.pause_mode, f"engine{number}"
                lanes.append(Lane(name, engine, hub, self.fetcher, process="rollout", mode=mode, ready_timeout_s=5.0))
            source = PromptSource(config.recipe.data, 5)
            worker = Rollout(config, Reporter(config), hub, lanes, source, Tokenizer(), Grader())

            async def act() -> None:
                if scenario is not None:
                    await scenario()
                    self.store.request_stop()

            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                tasks.create_task(worker.run())
                tasks.create_task(act())

    async def batch(self, step: int) -> list[Group]:
        while "groups" not in (reply := self.store.batch(step)):
            await asyncio.sleep(0.01)
        return [unpack_group(blob) for blob in reply["groups"]]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def expected(lease_id: int, index: int) -> list[int]:
    seed = sample_seed(5, lease_id, index)
    return [token(seed, t) for t in range(LENGTH - 1)] + [1]


def records(world: World) -> list[dict[str, Any]]:
    lines = world.server.metrics.read_text().splitlines() if world.server.metrics.exists() else []
    return [json.loads(line) for line in lines]


def test_groups_come_in_graded_and_whole(world: World) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario))
    assert [group.lease_id for group in got] == [0, 1, 2, 3]
    source = PromptSource(recipe().data, 5)
    for group in got:
        problem = source.problem(group.lease_id)
        assert (group.problem_id, group.answer) == (problem.id, problem.answer)
        assert group.prompt_tokens.tolist() == [ord(c) for c in problem.question]
        assert [sample.reward for sample in group.samples] == [1.0, 0.0, 1.0, 0.0]
        for sample in group.samples:
            assert sample.tokens.tolist() == expected(group.lease_id, sample.index)
            assert (sample.finish_reason, len(sample.segments)) == ("stop", 1)
            assert sample.text == "".join(chr(t) for t in sample.tokens[:-1])
    assert world.store.counts()["in_flight"] == 0, "what was not finished went back"


def test_an_update_ends_segments_and_the_continuation_equals_an_uncut_completion(world: World) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        await asyncio.sleep(0.06)
        world.store.announce(1, 1)
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario))
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
    assert world.store.state()["engines"]["engine0"] == {"version": 1, "state": "ready"}


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_requests_kept_through_an_update_count_as_the_oldest_version(world: World, mode: str) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        await until(lambda: world.engine.running == 8)
        await asyncio.sleep(0.05)
        world.store.announce(1, 1)
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario, weights={"pause_mode": mode}))
    assert world.engine.events == [f"pause {mode} with 8 running", "applied 1"]
    kept = [sample for group in got[:2] for sample in group.samples]
    assert [len(sample.segments) for sample in kept] == [1] * 8
    assert all(sample.versions.max() == 0 and sample.logprobs.min() == -2.0 for sample in kept)


def test_a_failed_update_is_repeated_in_full_and_serves_nothing_in_between(world: World) -> None:
    world.engine.refusals = 1

    async def scenario() -> None:
        await until(lambda: world.engine.running)
        world.store.announce(1, 1)
        await world.batch(0)
        await until(lambda: world.store.state()["engines"]["engine0"]["version"] == 1)

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, None)]
    assert [event for event in world.engine.events if "pause" not in event] == ["refused 1", "applied 1"]
    (record,) = records(world)
    assert (record["resyncs"], record["kind"], record["changed"], record["apply_s"]) == (1, "full", 7, 0.001)


def test_an_engine_in_which_our_loader_never_ran_is_woken_before_the_first_update(world: World) -> None:
    world.fetcher.watched = False

    async def scenario() -> None:
        await until(lambda: world.engine.running)
        world.store.announce(1, 1)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario))
    assert world.fetcher.woken == [0] and world.fetcher.asked == [(1, 0)]
    assert [event for event in world.engine.events if "pause" not in event] == ["applied 0", "applied 1"]


def test_what_is_generated_before_a_read_back_fails_is_lost_and_the_engine_resynced(world: World) -> None:
    world.engine.proofs = True
    world.fetcher.proofs = [RunFailed("read back under HF names, 1 tensors differ: a"), 0.01]

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
    world = World(tmp_path, step_s=0.001)
    world.store._board._every = 100  # an evaluation at step 0

    async def scenario() -> None:
        world.store.announce(0, 0)
        await world.batch(0)
        world.store.announce(1, 1)
        await world.batch(1)
        await asyncio.sleep(0.2)
        assert world.engine.events == [], "pinned: no update, and rollouts went on at the pinned version"
        assert (
            "(staleness 1, engine 2 versions behind the next batch)"
            in world.store.lease("x", 1, engine="engine0")["wait"]
        )
        world.store.eval_done(0, 0, {})
        await until(lambda: world.engine.version == 1)
        await until(lambda: world.store.counts()["in_flight"] + world.store.counts()["waiting"])

    try:
        asyncio.run(world.play(scenario))
    finally:
        world.close()


def test_two_engines_share_the_work_and_both_follow(world: World) -> None:
    world.others.append(FakeEngine(TOKEN, length=LENGTH).start())
    got: list[Group] = []

    async def scenario() -> None:
        for step in range(3):
            got.extend(await world.batch(step))
            world.store.announce(step + 1, step + 1)
        await until(lambda: world.engine.version == world.others[0].version == 3)

    asyncio.run(world.play(scenario))
    assert len({group.lease_id for group in got}) == 12
    assert all(sample.tokens.tolist() == expected(g.lease_id, sample.index) for g in got for sample in g.samples)
    assert all(group.oldest_version >= step - 1 for step, group in zip([0] * 4 + [1] * 4 + [2] * 4, got, strict=True))


def test_prompts_that_do_not_fit_are_skipped_and_counted(world: World) -> None:
    async def scenario() -> None:
        await until(lambda: world.store.counts()["skipped"] > 20)

    asyncio.run(world.play(scenario, data={"max_prompt_tokens": 4}))
    assert world.store.state()["skipped_in_a_row"] > 20
    with world.store._db.lock:
        (row,) = world.store._db.rows("SELECT reason FROM groups WHERE state = 'skipped' LIMIT 1")
    assert row[0].endswith("tokens, data.max_prompt_tokens = 4")


def test_a_run_whose_prompts_all_do_not_fit_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astracli.workers.rollout.UNFIT_PROMPTS", 30)

    async def scenario() -> None:
        await until(lambda: world.store.counts()["skipped"] > 10_000)

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(world.play(scenario, data={"max_prompt_tokens": 4}))
    (failure,) = error.value.exceptions
    assert isinstance(failure, RunFailed) and "30 prompts in a row do not fit, the last: prompt of" in failure.message
    assert "raise data.max_prompt_tokens" in str(failure.hint)


def test_an_engine_that_comes_back_is_given_weights_before_it_serves(world: World) -> None:
    async def scenario() -> None:
        world.store.announce(0, 0)
        await world.batch(0)
        world.store.announce(1, 1)
        await until(lambda: world.engine.version == 1 and world.engine.running)
        await asyncio.to_thread(world.engine.stop)
        await until(lambda: world.store.counts()["queued"] > 0)
        world.engine.version, world.engine.serving, world.engine.running = 0, False, 0
        world.engine.start()
        await world.batch(1)

    asyncio.run(world.play(scenario))
    assert world.fetcher.asked == [(1, 0), (1, 0)]
    assert world.engine.version == 1


def test_n_groups_are_written_without_a_trainer(world: World) -> None:
    out = world.path / "samples.jsonl"
    asyncio.run(world.play(extra={"out": str(out), "n": 5}))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 * 4
    assert {row["problem_id"] for row in rows} == {PromptSource(recipe().data, 5).problem(i).id for i in range(5)}
    row = rows[0]
    assert list(row) == [
        "step", "version", "problem_id", "problem", "answer", "sample", "completion", "tokens", "logprobs", "advantage",
        "reward", "verdict", "finish_reason",
    ]  # fmt: skip
    assert (row["step"], row["version"], row["advantage"], len(row["tokens"])) == (None, 0, None, LENGTH)


def save_tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(32 + i): 3 + i for i in range(95)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(str(path))


def test_a_killed_worker_process_loses_no_group(tmp_path: Path) -> None:
    """The real process, killed with SIGKILL in the middle of its groups and started again."""
    world = World(tmp_path, step_s=0.02)
    save_tokenizer(tmp_path)
    config = world.config(data={"reward": "probe"})
    file = tmp_path / "rollout.json"
    file.write_text(json.dumps(config.document()))
    argv = [sys.executable, "-m", "astracli.workers.rollout", str(file)]
    world.store._leases._drop_equal = False
    child = subprocess.Popen(argv)
    try:
        end = time.monotonic() + 60
        while world.engine.running < 8 and time.monotonic() < end:
            time.sleep(0.01)
        assert world.engine.running == 8
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert world.store.counts()["in_flight"] > 0
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        served = []
        for step in range(2):
            while "groups" not in (reply := world.store.batch(step)) and time.monotonic() < end:
                time.sleep(0.02)
            served += [unpack_group(blob).lease_id for blob in reply["groups"]]
            world.store.engine_state("engine0", step + 1, "ready")
        assert sorted(served) == list(range(8))
        world.store.request_stop()
        out, err = child.communicate(timeout=15)
        assert (child.returncode, out, err) == (0, "", "")
    finally:
        child.kill()
        child.wait()
        world.close()
