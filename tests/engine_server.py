"""An embedded engine with its HTTP server in threads, for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engine_models import tiny_model

from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest
from astracli.engines.embedded.engine import EmbeddedEngine
from astracli.engines.embedded.http import build_app
from astracli.models.adapter import ModelAdapter
from astracli.process.ports import bind
from astracli.process.server import ServerThread

TOKEN = "secret-of-the-run"


class Idle:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.reasons: list[str | None] = []

    def waiting(self, reason: str | None) -> None:
        self.reasons.append(reason)

    def progress(self, **fields: Any) -> None:
        pass


def save(path: Path, kind: str = "qwen3_5", seed: int = 0) -> Path:
    tiny_model(kind, seed).bfloat16().save_pretrained(path)
    return path


def loader(adapter: ModelAdapter) -> Callable[[Path], tuple[Any, Any]]:
    def load(path: Path) -> tuple[Any, Any]:
        model = adapter.load_for_serving(path, attention="sdpa")
        if adapter.prepare_cpu is not None:
            adapter.prepare_cpu(model)
        return model, adapter.wire_tensors(model)

    return load


@contextmanager
def running(engine: EmbeddedEngine) -> Iterator[str]:
    """The engine's loop and server in threads; yields its URL."""
    reporter = Idle()
    loop = threading.Thread(target=engine.loop, args=(reporter,), daemon=True)
    loop.start()
    server = ServerThread(build_app([engine], TOKEN), bind()).start()
    try:
        yield server.url
    finally:
        server.stop()
        reporter.stop_requested.set()
        loop.join(timeout=5)


def engine_of(path: Path, adapter: ModelAdapter = QWEN3_5, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(path, loader(adapter), slots=6, context_length=64, **options)


def with_client(engine: EmbeddedEngine, scenario: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def go(url: str) -> None:
        async with EngineClient(url, TOKEN, name="engine0", not_serving_s=0.5) as client:
            await client.wait_ready(10)
            await scenario(client)

    with running(engine) as url:
        asyncio.run(go(url))


def long_requests(count: int, **fields: Any) -> list[GenRequest]:
    settings: dict[str, Any] = {"max_new_tokens": 50} | fields
    return [GenRequest([3 + i, 5, 7], seed=i, rid=f"r{i}", **settings) for i in range(count)]


@asynccontextmanager
async def slow(engine: EmbeddedEngine, step_s: float = 0.02) -> AsyncIterator[None]:
    """Every decode step takes at least `step_s`: time to interfere with running requests."""
    decode = engine.scheduler.decoder.decode

    def slow(tokens: np.ndarray, lengths: np.ndarray) -> Any:
        time.sleep(step_s)
        return decode(tokens, lengths)

    engine.scheduler.decoder.decode = slow  # type: ignore[method-assign]
    yield
    engine.scheduler.decoder.decode = decode  # type: ignore[method-assign]
