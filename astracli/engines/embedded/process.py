"""The embedded engine's process: `python -m astracli.engines.embedded.process CONFIG.json`.

HTTP is served from a thread, and answers 503 while torch and the model load; decoding runs in the main thread.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.engines.embedded.http import Door, build_app
from astracli.engines.embedded.plugin import ENGINE
from astracli.errors import RunFailed
from astracli.process.config import EngineConfig
from astracli.process.worker import Reporter, worker_main

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from astracli.engines.embedded.engine import EmbeddedEngine
    from astracli.models.adapter import ModelAdapter


def run(config: EngineConfig, reporter: Reporter) -> None:
    """Serve until told to stop. Raises RunFailed when the port is taken or the model produces NaN."""
    door = Door()
    listener = bind(config.recipe.launch.host, config.port)
    with serving(build_app(door, config.token), listener):
        engine = load_engine(config)
        door.engine = engine
        reporter.ready()
        engine.loop(reporter)


def bind(host: str, port: int) -> socket.socket:
    """A listening-ready socket; port 0 takes a free one. Raises RunFailed when it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # asyncio sets this only on sockets made with proto=IPPROTO_TCP; without it a reply waits 40 ms to be acknowledged.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RunFailed(
            f"the engine cannot listen on {host}:{port}: {error.strerror or error}",
            "another process holds the port, or launch.host is not an address of this machine",
        ) from None
    return listener


@contextmanager
def serving(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    """Serve `app` on `listener` from a daemon thread while the block runs."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",  # `auto` takes whatever some other package installed
            http="h11",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=1.5)
        listener.close()


def loader(adapter: ModelAdapter, device: str) -> Callable[[Path], tuple[Any, Any]]:
    """Reads a checkpoint directory: (model, its wire tensors)."""

    def load(path: Path) -> tuple[Any, Any]:
        model = adapter.load_for_serving(path, attention="sdpa").eval()  # slots need a mask of their own
        if device == "cpu" and adapter.prepare_cpu is not None:
            adapter.prepare_cpu(model)
        return model, adapter.wire_tensors(model)

    return load


def load_engine(config: EngineConfig) -> EmbeddedEngine:
    """Load the model through its adapter, as version 0."""
    import torch

    from astracli.engines.embedded.engine import EmbeddedEngine, EngineLimits
    from astracli.kernels.cpu.memory import keep_freed_memory
    from astracli.models import registry

    torch.set_num_threads(config.threads)
    if config.device == "cpu":
        keep_freed_memory()
    adapter = registry.resolve(config.recipe, config.model_path)
    rollout = config.recipe.rollout
    return EmbeddedEngine(
        config.model_path,
        loader(adapter, config.device),
        EngineLimits(rollout.running, rollout.context_length, ENGINE.own(config.recipe).chunked_prefill_size),
        stage_dir=config.stage_dir,
        device=config.device,
        exclusive_calls=config.recipe.launch.deterministic,
        problem="waiting for its weights" if config.await_weights else None,
        verify_interval=config.recipe.weights.verify_interval,
    )


if __name__ == "__main__":
    worker_main(run, EngineConfig)
