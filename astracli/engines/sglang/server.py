"""An SGLang engine's process, `python -m astracli.engines.sglang.server CONFIG.json`: starts, watches, ends a server.

The server runs in the engine's own environment (`resources.engine`), this process in the run's: it writes the model
directory, reports readiness, passes the server's output on without the run's token, and explains its end. Under
`astra train` the server starts from made-up weights and gets version 0 like every other version, verified by digest; it
serves nothing before. One server per GPU (SGLang takes weights over HTTP with data parallelism 1 only).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from astracli.engines import checkpoint, watched
from astracli.engines.sglang import command, failure_hints, first_requests
from astracli.process import ports
from astracli.process.config import EngineConfig
from astracli.process.worker import Reporter, worker_main
from astracli.runs.run_dir import RunDir

SGLANG = watched.Foreign(
    title="SGLang",
    package="sglang",
    module="sglang.launch_server",
    needed=("sglang", "torch", "numpy", "xxhash", "zstandard"),
    recorded=(
        *("sglang", "torch", "transformers", "triton", "flashinfer-python", "sglang-kernel", "sgl-kernel"),
        *("flash-linear-attention", "numpy", "xxhash", "zstandard"),
    ),
    death=failure_hints.death,
)


def run(config: EngineConfig, reporter: Reporter) -> None:
    """Serve until told to stop. Raises RunFailed when the server dies, hangs or never becomes ready."""
    from astracli.models import registry

    adapter = registry.resolve(config.recipe, config.model_path)
    environment = {**watched.engine_environment(config), **command.rendezvous(config)}
    facts = watched.probe(SGLANG, config, environment)
    folder = RunDir(config.run_dir).stage / f"{config.name}-model"
    model = checkpoint.prepare(folder, config.model_path, adapter, weights=not config.published)
    flags = adapter.engine_flags(json.loads((model / "config.json").read_text()))
    arguments = command.arguments(config, model, command.Options(Path(facts["package"])), flags)
    server = watched.Server(SGLANG, config, facts["executable"], arguments, environment)
    try:
        watched.wait_ready(config, server, reporter)
        _first_requests(config, server, reporter)
        reporter.ready()
        watched.watch(config, server, reporter)
    finally:
        server.stop()


def _first_requests(config: EngineConfig, server: watched.Server, reporter: Reporter) -> None:
    """Have the server compile what the run's ways of sampling need. Raises RunFailed."""
    found = first_requests.samplings(config.recipe)
    if not first_requests.need_kernels(found):
        return
    began, limit = time.monotonic(), config.recipe.launch.ready_timeout_s
    url = ports.url(config.recipe.launch.host, config.port)
    with ThreadPoolExecutor(1) as aside:
        asked = aside.submit(first_requests.ask, url, config.token, found, limit)
        while not asked.done() and not reporter.stop_requested.wait(watched.LOOK_S):
            server.check()
            reporter.waiting(f"SGLang to compile its sampling kernels ({time.monotonic() - began:.0f} s)")
        if asked.done() and (wrong := asked.result()):
            server.check()
            raise server.died(f"did not answer its first requests: {wrong}")
        reporter.progress(sampling_s=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    worker_main(run, EngineConfig)
