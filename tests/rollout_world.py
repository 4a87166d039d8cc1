"""What the tests of the rollout worker share: a real hub, engines on real sockets, and the worker beside a scenario."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import configs
import pytest
from fake_engine import FakeEngine, FakeFetcher, token
from hub_tools import open_store
from test_hub_api import TOKEN, Server

from astracli.config.recipe import Recipe
from astracli.data.prompts import PromptSource
from astracli.engines.client import EngineClient
from astracli.engines.sglang.client import SglangClient
from astracli.envs import registry as envs
from astracli.envs.contract import EnvSetup
from astracli.envs.prompt_tokens import PromptTokens
from astracli.envs.time_limit import LoopWatch
from astracli.hub.client import AsyncHubClient
from astracli.hub.store import HubStore
from astracli.models.chat import ChatFormat
from astracli.process.config import EngineAddress, RolloutConfig
from astracli.process.worker import Reporter
from astracli.rewards.reward import Grade, GradeItem
from astracli.rl.schedule import sample_seed
from astracli.rl.types import Group, unpack_group
from astracli.rollout.engine_worker import EngineWorker
from astracli.rollout.worker import Rollout

LENGTH = 20


class Tokenizer:
    """Characters as tokens."""

    chat_template = None
    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t) for t in tokens if t != 1)


class Grader:
    """Right for every even sample of a group."""

    async def agrade(self, items: Sequence[GradeItem]) -> list[Grade]:
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

    def __init__(self, path: Path, hub: dict[str, Any] | None = None, **engine: Any):
        self.path = path
        self.engine = FakeEngine(TOKEN, **({"length": LENGTH} | engine)).start()
        self.others: list[FakeEngine] = []
        self.fetcher = FakeFetcher()
        self.workers: list[EngineWorker] = []
        self.server = Server(open_store(path, **({"steps": 6} | (hub or {}))), path)

    @property
    def store(self) -> HubStore:
        return self.server.store

    def close(self) -> None:
        self.server.thread.stop()
        for engine in [self.engine, *self.others]:
            engine.stop()

    def config(self, **changes: Any) -> RolloutConfig:
        samples = changes.pop("samples", None)
        return configs.rollout(
            run_dir=self.path,
            hub_url=self.server.url,
            token=TOKEN,
            recipe=recipe(**changes),
            model_path=self.path,
            engines=(EngineAddress(name="engine0", url=self.engine.url, stage_dir=self.path),),
            samples=samples,
        )

    async def play(self, scenario: Callable[[], Awaitable[None]] | None = None, **changes: Any) -> None:
        """Until the worker ends; the scenario requests the stop when it is through."""
        config = self.config(**changes)
        async with contextlib.AsyncExitStack() as stack:
            hub = await stack.enter_async_context(AsyncHubClient(config.hub_url, TOKEN))
            workers = []
            for number, fake in enumerate([self.engine, *self.others]):
                made = SglangClient(fake.url, TOKEN, stage_dir=fake.stage_dir) if fake.stage_dir else None
                engine = await stack.enter_async_context(made or EngineClient(fake.url, TOKEN))
                mode, name = config.recipe.weights.pause_mode, f"engine{number}"
                workers.append(
                    EngineWorker(name, engine, hub, self.fetcher, process="rollout", mode=mode, ready_timeout_s=60.0)
                )
            self.workers = workers
            source = PromptSource(config.recipe.data, 5)
            tokenizer = Tokenizer()
            env = envs.find(config.recipe.rollout.env)(
                EnvSetup(config.recipe, tokenizer, lambda problem: Grader(), PromptTokens(tokenizer, ChatFormat()))
            )
            stack.enter_context(LoopWatch(config.recipe.rollout.env_timeout_s))
            worker = Rollout(config, Reporter(config), hub, workers, source, env)

            async def act() -> None:
                if scenario is not None:
                    await scenario()
                    self.store.request_stop()

            async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
                tasks.create_task(worker.run())
                tasks.create_task(act())

    async def batch(self, step: int) -> list[Group]:
        while (reply := self.store.batch(step)).batch is None:
            await asyncio.sleep(0.01)
        return [unpack_group(blob) for blob in reply.batch.groups]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def expected(lease_id: int, index: int, length: int | Callable[[int], int] = LENGTH) -> list[int]:
    seed = sample_seed(5, lease_id, index)
    tokens = length if isinstance(length, int) else length(seed)
    return [token(seed, t) for t in range(tokens - 1)] + [1]


def records(world: World) -> list[dict[str, Any]]:
    lines = world.server.metrics.read_text().splitlines() if world.server.metrics.exists() else []
    return [json.loads(line) for line in lines]
