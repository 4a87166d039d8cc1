"""The process that watches an SGLang server: real processes, a stand-in for SGLang itself (tests/fake_sglang)."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_engines import ended, is_ready, model_dir, process, sglang_config, until
from safetensors import safe_open
from safetensors.torch import save_file
from test_workers_common import TOKEN, FakeHub, hub

from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.engines import checkpoint, watched
from astracli.engines.sglang import first_requests
from astracli.engines.sglang import server as sglang
from astracli.engines.sglang.command import RENDEZVOUS, Options, arguments, graph_sizes
from astracli.engines.sglang.settings import SglangTable
from astracli.errors import RunFailed

__all__ = ["hub"]

FAKE = Path(__file__).parent / "fake_sglang"
OPTIONS = Options(FAKE / "sglang")
Weights = dict[str, torch.Tensor]


def weights(seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    prefix = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (32, 8), **{f"{prefix}self_attn.{n}_proj.weight": s for n, s in
              (("q", (16, 8)), ("k", (4, 8)), ("v", (4, 8)))}}  # fmt: skip
    found = {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}
    return found | {prefix + "linear_attn.A_log": torch.randn(4, generator=draw)}


@pytest.mark.parametrize("mode", ["answers", "compiler"])
def test_sampling_kernels_are_compiled_before_the_engine_is_ready(tmp_path: Path, hub: FakeHub, mode: str) -> None:
    """Greedy samples beside drawn ones: SGLang compiles flashinfer's kernels at the first such batch."""
    config = sglang_config(tmp_path, hub, mode)
    recipe = config.recipe
    recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"greedy": True, "temperature": 0.6})})
    config = config.model_copy(update={"recipe": recipe})
    if mode == "compiler":
        code, said = ended(config)
        assert code == 1 and "nvcc: not found" in said and not is_ready(hub)
        return
    with process(config) as watcher:
        until(lambda: is_ready(hub))
        os.killpg(watcher.pid, signal.SIGTERM)
        said = watcher.communicate(timeout=30)[0]
    line = next(line for line in said.splitlines() if line.startswith("first requests: "))
    asked = [(one["temperature"], one["top_p"]) for one in json.loads(line.removeprefix("first requests: "))]
    assert asked == [(1.0, 1.0), (0.6, 1.0), (0.0, 1.0)], "one call, so that they share a batch"


def test_which_ways_of_sampling_need_kernels() -> None:
    need = first_requests.need_kernels
    assert not need([(1.0, 1.0), (0.6, 1.0)]) and not need([(0.0, 1.0)])
    assert need([(1.0, 1.0), (0.0, 1.0)]) and need([(1.0, 1.0), (0.6, 0.95)])


def test_command_line(tmp_path: Path, hub: FakeHub) -> None:
    config = sglang_config(tmp_path, hub)
    (tmp_path / "config").mkdir()
    found = arguments(config, Path("/m"), OPTIONS, {"mamba_ssm_dtype": "float32"})
    assert {"--model-path=/m", "--load-format=dummy", "--weight-version=-1", "--attention-backend=triton"} <= set(found)
    assert {"--linear-attn-backend=triton", "--max-running-requests=32", "--mem-fraction-static=0.7"} <= set(found)
    assert {"--disable-radix-cache", "--mamba-ssm-dtype=float32", "--max-total-tokens=262144"} <= set(found)
    assert found[found.index("--cuda-graph-bs-decode") + 1 :][:4] == ["1", "2", "4", "8"]
    assert not any("mm-feature" in part or TOKEN in part for part in found)
    secret = Path(found[found.index("--config") + 1])
    assert json.loads(secret.read_text()) == {"api-key": TOKEN} and secret.stat().st_mode & 0o777 == 0o600
    alone = config.model_copy(update={"published": False, "serving_attention": "auto", "linear_attention": "none"})
    hybrid = arguments(config.model_copy(update={"prefix_cache": True}), Path("/m"), OPTIONS, {})
    assert "--disable-radix-cache" not in hybrid and f"--max-mamba-cache-size={3 * 32}" in hybrid
    assert {"--disable-overlap-schedule", "--mamba-radix-cache-strategy=no_buffer"} <= set(hybrid)
    found = arguments(alone.model_copy(update={"prefix_cache": True}), Path("/m"), OPTIONS, {})
    assert "--disable-radix-cache" not in found and not any("mamba" in part for part in found)
    assert {"--load-format=safetensors", "--weight-version=0"} <= set(found)
    assert not any("attention-backend" in part or "linear" in part for part in found)


def test_what_the_recipe_says_of_an_engine_is_on_its_command_line(tmp_path: Path, hub: FakeHub) -> None:
    """One server a GPU: never data parallelism, through which SGLang takes no weights. In turns it may leave."""
    config = sglang_config(tmp_path, hub)
    (tmp_path / "config").mkdir()
    asked = {"context_length": 4096, "max_running_requests": 24}
    own = SglangTable(chunked_prefill_size=2048, mem_fraction_static=0.55, prefill_delay_ratio=0.05)
    rollout = config.recipe.rollout.model_copy(update={**asked, "sglang": own})
    recipe = config.recipe.model_copy(update={"rollout": rollout, "seed": 7})
    config = config.model_copy(update={"recipe": recipe, "mem_fraction_static": 0.55})
    found = arguments(config, Path("/m"), OPTIONS, {})
    port = config.port
    assert {"--host=127.0.0.1", f"--port={port}", "--skip-tokenizer-init", "--dtype=bfloat16"} <= set(found)
    assert {"--context-length=4096", "--chunked-prefill-size=2048", "--max-running-requests=24"} <= set(found)
    assert {"--mem-fraction-static=0.55", "--random-seed=7", f"--max-total-tokens={24 * 4096}"} <= set(found)
    assert not any(part.startswith(("--dp", "--data-parallel", "--tp")) for part in found)
    assert {"--enable-prefill-delayer", "--prefill-delayer-queue-min-ratio=0.05"} <= set(found)
    leaves = ("--enable-memory-saver", "--enable-weights-cpu-backup")
    assert not set(leaves) & set(found)
    stops = recipe.model_copy(update={"rollout": rollout.model_copy(update={"stop": ["\n"]})})
    found = arguments(config.model_copy(update={"recipe": stops}), Path("/m"), OPTIONS, {})
    assert f"--tokenizer-path={config.model_path}" in found and "--skip-tokenizer-init" not in found
    planned = config.model_copy(update={"time_sharing": True, "mem_fraction_static": 0.31})
    found = arguments(planned, Path("/m"), OPTIONS, {})
    assert {*leaves, "--mem-fraction-static=0.31"} <= set(found), "what the plan derived is the last word"


def test_an_engine_that_answers_no_more_is_given_up_with_its_last_lines(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four health checks in a row; one that is answered meanwhile begins the count anew."""
    replies = iter([False, False, False, True, False, False, False, False])
    asked: list[str] = []

    def answers(url: str, token: str, timeout_s: float) -> bool:
        asked.append(url.rpartition("/")[2])
        return next(replies)

    class Hung:
        lines = ("[2026-11-23 12:17:04] all is well", "Scheduler watchdog timeout (self.watchdog_timeout=300)")

        def check(self) -> None:
            pass

        def died(self, what: str) -> RunFailed:
            return sglang.SGLANG.death("engine0", what, self.lines)

    class Running:
        stop_requested = threading.Event()

    for name, value in (("answers", answers), ("HEALTH_EVERY_S", 0.0), ("LOOK_S", 0.001)):
        monkeypatch.setattr(watched, name, value)
    config: Any = sglang_config(tmp_path, hub)
    with pytest.raises(RunFailed, match="engine0 failed 4 health checks in a row: its scheduler hung") as error:
        watched.watch(config, Hung(), Running())  # type: ignore[arg-type]
    assert asked == ["health_generate"] * 8 and "attention_backend=triton" in str(error.value.hint)
    replies, asked[:] = iter([False] * 4), []
    with pytest.raises(
        RunFailed, match="failed 4 health checks"
    ):  # nothing can be generated while the trainer has the GPU
        watched.watch(config.model_copy(update={"time_sharing": True}), Hung(), Running())  # type: ignore[arg-type]
    assert asked == ["model_info"] * 4


def test_options_are_found_wherever_a_release_keeps_them(tmp_path: Path) -> None:
    for place in ("server_args.py", "arg_groups/fields/model.py"):
        package = tmp_path / place.partition(".")[0]
        (package / "srt" / "arg_groups" / "fields").mkdir(parents=True)
        (package / "srt" / "server_args.py").write_text("")
        (package / "srt" / "environ.py").write_text(RENDEZVOUS)
        (package / "srt" / place).write_text("    custom_weight_loader: A[list[str], 'help'] = None")
        assert Options(package).has("custom_weight_loader") and not Options(package).has("weight_loader")
    (package / "srt" / place).write_text("")
    with pytest.raises(RunFailed, match="takes no custom weight loader"):
        Options(package)


def test_graph_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(12) == [1, 2, 4, 8, 12]
    assert graph_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100]
    assert graph_sizes(1024)[16:] == [256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert graph_sizes(300)[-3:] == [224, 256, 300]


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_the_directory_that_sglang_loads_holds_text_names_whatever_the_checkpoint_has(
    tmp_path: Path, prefix: str
) -> None:
    source, out = model_dir(tmp_path), tmp_path / "out"
    norm, lm_head = torch.ones(32).bfloat16(), torch.zeros(64, 32).bfloat16()
    full = prefix != "model."
    if full:
        config = {"model_type": "qwen3_5", "text_config": json.loads((source / "config.json").read_text())}
        (source / "config.json").write_text(json.dumps(config))
    save_file({f"{prefix}norm.weight": norm}, source / "model-1.safetensors")
    extra: Weights = {"model.visual.x": norm.clone(), "lm_head.weight": lm_head.clone()} if full else {}
    save_file({f"{prefix}embed_tokens.weight": lm_head, **extra}, source / "model-2.safetensors")
    checkpoint.prepare(out, source, QWEN3_5, weights=True)
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["full_attention_interval"]) == (["Qwen3_5ForCausalLM"], 4)
    names: dict[str, str] = {}
    for shard in out.glob("*.safetensors"):
        assert shard.is_symlink() != full
        with safe_open(shard, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), shard.name)
    assert names == {"model.norm.weight": "model-1.safetensors", "model.embed_tokens.weight": "model-2.safetensors"}
    assert json.loads((out / checkpoint.SHARD_INDEX).read_text())["weight_map"] == names
    bare = checkpoint.prepare(tmp_path / "bare", source, QWEN3_5, weights=False)
    assert [path.name for path in bare.iterdir()] == ["config.json"]
