"""A vLLM engine's process, `python -m astracli.engines.vllm.server CONFIG.json`: starts, watches, ends the server.

Under `astra train` the server starts from made-up weights and gets version 0 like every other version, verified by
digest; it serves nothing before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from astracli.engines import checkpoint, watched
from astracli.engines.vllm import failure_hints
from astracli.engines.vllm.names import EXECUTOR, STORE, WORKER, old_transformers
from astracli.engines.vllm.settings import own
from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic
from astracli.process.config import EngineConfig
from astracli.process.worker import Reporter, worker_main
from astracli.runs.run_dir import RunDir

VLLM = watched.Foreign(
    title="vLLM",
    package="vllm",
    module="astracli.engines.vllm.serve",
    needed=("vllm", "torch", "numpy", "xxhash", "zstandard", "starlette", "uvicorn", "psutil"),
    recorded=("vllm", "torch", "transformers", "triton", "flashinfer-python", "numpy", "xxhash", "zstandard"),
    death=failure_hints.death,
)
ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",  # how long a start may take is our process's affair
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Of the server. Its processes meet on this host alone, by Unix sockets."""


def run(config: EngineConfig, reporter: Reporter) -> None:
    """Serve until told to stop. Raises RunFailed when the server dies, hangs or never becomes ready."""
    from astracli.models import registry

    adapter = registry.resolve(config.recipe, config.model_path)
    environment = {**watched.engine_environment(config), **ENV, STORE: watched.rank_store(config)}
    facts = watched.probe(VLLM, config, environment)
    has = str(facts["versions"]["transformers"])
    if (why := old_transformers(has)) is not None:
        raise RunFailed(f"the engine's environment has transformers {has}: {why[0]}", why[1])
    folder = RunDir(config.run_dir).stage / f"{config.name}-model"
    model = checkpoint.prepare(folder, config.model_path, adapter, weights=not config.published)
    path = RunDir(config.run_dir).config / f"{config.name}.vllm.json"
    told = {
        "host": config.recipe.launch.host,
        "port": config.port,
        "token": config.token,
        "serving": not config.published,
        "seeded": config.recipe.launch.deterministic,
        "vocabulary": json.loads((model / "config.json").read_text())["vocab_size"],
        "engine": engine_arguments(config, model),
    }
    write_atomic(path, json.dumps(told) + "\n", mode=0o600)
    server = watched.Server(VLLM, config, facts["executable"], [str(path)], environment)
    try:
        watched.wait_ready(config, server, reporter)
        reporter.ready()
        watched.watch(config, server, reporter)
    finally:
        server.stop()


def engine_arguments(config: EngineConfig, model: Path) -> dict[str, Any]:
    """Keywords of vLLM's AsyncEngineArgs."""
    rollout, table = config.recipe.rollout, own(config.recipe)
    found: dict[str, Any] = {
        "model": str(model),
        "tokenizer": str(config.model_path),
        "skip_tokenizer_init": not rollout.stop,  # stop strings are looked for in text
        "load_format": "dummy" if config.published else "safetensors",
        "dtype": "bfloat16",  # as published
        "seed": config.recipe.seed,
        "max_model_len": rollout.context_length,
        "max_num_seqs": rollout.running,
        "max_num_batched_tokens": max(table.max_num_batched_tokens, rollout.running),
        "gpu_memory_utilization": config.mem_fraction_static,
        "enable_prefix_caching": config.prefix_cache,
        "enable_sleep_mode": config.time_sharing,
        "enforce_eager": table.enforce_eager,
        "logprobs_mode": logprobs_mode(rollout.temperature),
        "generation_config": "vllm",  # no sampling defaults of the checkpoint's
        "worker_extension_cls": WORKER,
        "distributed_executor_backend": EXECUTOR,
        "enable_log_requests": False,
        "disable_log_stats": False,  # its timestamps say which weights drew a token
    }
    if config.serving_attention != "auto":
        found["attention_backend"] = config.serving_attention.upper()
    return found


def logprobs_mode(temperature: float) -> str:
    """vLLM reports one of two: before temperature, which is what was drawn from at 1; or after temperature and top-p,
    which is what the trainer compares with where top-p is 1 (`plugin.choose` refuses the rest)."""
    return "raw_logprobs" if temperature == 1.0 else "processed_logprobs"


if __name__ == "__main__":
    worker_main(run, EngineConfig)
