"""The embedded engine's process: `python -m astracli.engines.embedded.process CONFIG.json`.

HTTP is served from a thread, and answers 503 while torch and the model load; decoding runs in the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.engines.embedded.http import build_app
from astracli.engines.embedded.plugin import ENGINE
from astracli.process import ports
from astracli.process.config import EngineConfig
from astracli.process.server import ServerThread
from astracli.process.worker import Reporter, worker_main

if TYPE_CHECKING:
    from astracli.engines.embedded.engine import EmbeddedEngine
    from astracli.models.adapter import ModelAdapter


def run(config: EngineConfig, reporter: Reporter) -> None:
    """Serve until told to stop. Raises RunFailed when the port is taken or the model produces NaN."""
    loaded: list[EmbeddedEngine] = []
    host = config.recipe.launch.host
    server = ServerThread(build_app(loaded, config.token), ports.bind(host, config.port), host).start()
    try:
        loaded.append(load_engine(config))
        reporter.ready()
        loaded[0].loop(reporter)
    finally:
        server.stop(timeout_s=1.5)


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

    from astracli.engines.embedded.engine import EmbeddedEngine
    from astracli.kernels.cpu.memory import bound_memory
    from astracli.models import registry

    torch.set_num_threads(config.threads)
    if config.device == "cpu":
        bound_memory()
    adapter = registry.resolve(config.recipe, config.model_path)
    rollout = config.recipe.rollout
    return EmbeddedEngine(
        config.model_path,
        loader(adapter, config.device),
        slots=rollout.running,
        context_length=rollout.context_length,
        prefill_tokens=ENGINE.own(config.recipe).chunked_prefill_size,
        stage_dir=config.stage_dir,
        device=config.device,
        exclusive_calls=config.recipe.launch.deterministic,
        problem="waiting for its weights" if config.await_weights else None,
        verify_interval=config.recipe.weights.verify_interval,
        decoding=adapter.decoding,
    )


if __name__ == "__main__":
    worker_main(run, EngineConfig)
