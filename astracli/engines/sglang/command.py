"""The command line of an SGLang server: which options the installed release knows, and what a run sets them to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.engines import watched
from astracli.engines.contract import UNPROVEN
from astracli.engines.sglang.client import SETTLE_LOADER, STAGED_LOADER
from astracli.engines.sglang.memory import SglangMemory
from astracli.engines.sglang.settings import own
from astracli.errors import RunFailed
from astracli.process.atomic import write_atomic
from astracli.process.config import EngineConfig
from astracli.runs.run_dir import RunDir

RENDEZVOUS = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""Environment of the server: where its ranks meet. By itself SGLang opens a TCP store of torch's for its one rank, and
that listens on every interface whatever `--host` says."""

PREFILL_DELAY_MS = 100.0
"""Longest delay of a prefill by `rollout.sglang.prefill_delay_ratio`."""


class Options:
    """The command line options that an installed SGLang knows, read from its source: releases rename them.

    They are fields of a class in `server_args.py`; from 0.5.20 on its parts lie in `arg_groups`.
    """

    def __init__(self, package: Path):
        file = package / "srt" / "server_args.py"
        parts = [file, *sorted((package / "srt" / "arg_groups").rglob("*.py"))]
        environment = package / "srt" / "environ.py"
        self._environment = environment.read_text(errors="replace") if environment.is_file() else ""
        try:
            self._source = "\n".join(part.read_text() for part in parts)
        except OSError as error:
            raise RunFailed(f"`{file}` cannot be read: {error.strerror}", "install sglang anew") from None
        if not self.has("custom_weight_loader"):
            raise RunFailed(f"the SGLang in `{package}` takes no custom weight loader", "install sglang >= 0.5.17")
        if RENDEZVOUS not in self._environment:
            raise RunFailed(
                f"the SGLang in `{package}` does not know {RENDEZVOUS}: it would listen for its ranks on every "
                "interface of this machine, without a token",
                "install sglang >= 0.5.17",
            )

    def has(self, name: str) -> bool:
        return re.search(rf"\b{name}\b", self._source) is not None


def arguments(config: EngineConfig, model: Path, options: Options, flags: Mapping[str, Any]) -> list[str]:
    """The server's arguments. `flags`: the adapter's own. The token is not among them: it stands in a file."""
    rollout = config.recipe.rollout
    slots = rollout.running
    settings: dict[str, Any] = {
        "model_path": model,
        "host": config.recipe.launch.host,
        "port": config.port,
        "skip_tokenizer_init": not rollout.stop,  # stop strings are looked for in text
        "context_length": rollout.context_length,
        "max_running_requests": slots,
        "max_total_tokens": slots * rollout.context_length,  # more could never be used
        "mem_fraction_static": config.mem_fraction_static,
        "enable_memory_saver": config.time_sharing,
        "enable_weights_cpu_backup": config.time_sharing,
        "chunked_prefill_size": own(config.recipe).chunked_prefill_size,
        "random_seed": config.recipe.seed,
        "dtype": "bfloat16",  # as published; a config that does not say is served in fp16
        "custom_weight_loader": [STAGED_LOADER, SETTLE_LOADER],
        "load_format": "dummy" if config.published else "safetensors",
        "weight_version": UNPROVEN if config.published else 0,
        "log_level_http": "warning",
        "disable_prefill_cuda_graph": True,  # dozens of graphs, minutes of start-up, no gain at these prompt lengths
        "cuda_graph_bs_decode" if options.has("cuda_graph_bs_decode") else "cuda_graph_bs": graph_sizes(slots),
        **flags,
    }
    if rollout.stop:
        settings["tokenizer_path"] = config.model_path  # `model` has no tokenizer
    if config.device == "cpu":
        settings |= {"device": "cpu", "disable_overlap_schedule": True, "disable_cuda_graph": True}
        del settings["disable_prefill_cuda_graph"]
    if not config.prefix_cache:
        settings["disable_radix_cache"] = True
    elif config.linear_attention != "none":
        # 0.5.17 does not know the text model as a hybrid with a cache, and leaves on what its strategy forbids
        settings |= {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
        settings["max_mamba_cache_size"] = slots * SglangMemory.cached_states
    if config.serving_attention != "auto":
        settings["attention_backend"] = config.serving_attention
    if config.linear_attention != "none":
        settings["linear_attn_backend"] = config.linear_attention
    if config.recipe.launch.deterministic:
        settings["enable_deterministic_inference"] = True
    if ratio := own(config.recipe).prefill_delay_ratio:
        if not options.has("prefill_delayer_queue_min_ratio"):
            hint = "take SGLang 0.5.17 or later, or leave the key at 0"
            raise RunFailed("this SGLang does not know `rollout.sglang.prefill_delay_ratio`", hint)
        settings |= {"enable_prefill_delayer": True, "prefill_delayer_queue_min_ratio": ratio}
        settings["prefill_delayer_max_delay_ms"] = PREFILL_DELAY_MS
    optional = {"disable_prefill_cuda_graph", "mm_feature_transport", "mamba_ssm_dtype", "mamba_radix_cache_strategy"}
    settings["mm_feature_transport"] = "cpu"  # else a gigabyte of the GPU is kept for images
    result = ["--config", str(_secret(config))]
    for name, value in settings.items():
        if name in optional and not options.has(name):
            continue
        dashed = "--" + name.replace("_", "-")
        if value is True:
            result.append(dashed)
        elif isinstance(value, (list, tuple)):
            result += [dashed, *map(str, value)]
        elif value is not False:
            result.append(f"{dashed}={value}")
    return result


def rendezvous(config: EngineConfig) -> dict[str, str]:
    """The server's ranks meet by a new file, without a socket."""
    return {RENDEZVOUS: watched.rank_store(config)}


def graph_sizes(slots: int) -> list[int]:
    """Batch sizes whose decode step is captured as a CUDA graph; a smaller batch runs in the next larger.

    Wider apart as they grow, because each is captured at start-up: from 64 on a batch is padded by half at most, from
    128 on by a quarter.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, 513, 64), *range(640, slots + 1, 128)]
    return sorted({size for size in sizes if size <= slots} | {slots})


def _secret(config: EngineConfig) -> Path:
    """The token where `ps` does not show it: JSON is YAML, and SGLang reads options from a YAML file."""
    path = RunDir(config.run_dir).config / f"{config.name}.sglang.yaml"
    write_atomic(path, json.dumps({"api-key": config.token}) + "\n", mode=0o600)
    return path
