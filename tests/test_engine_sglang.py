"""The process that watches an SGLang server: real processes, a stand-in for SGLang itself (tests/fake_sglang)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import configs
import psutil
import pytest
import torch
import warm
from safetensors import safe_open
from safetensors.torch import save_file
from test_workers_common import TOKEN, FakeHub, hub
from transfer_tools import TOKEN as WEIGHTS_TOKEN
from transfer_tools import Server as WeightServer

from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.engines import checkpoint, watched
from astracli.engines.contract import GenRequest
from astracli.engines.sglang import first_requests
from astracli.engines.sglang import server as sglang
from astracli.engines.sglang.client import SglangClient
from astracli.engines.sglang.command import RENDEZVOUS, Options, arguments, graph_sizes
from astracli.engines.sglang.settings import SglangTable
from astracli.errors import RunFailed
from astracli.process.config import EngineConfig
from astracli.process.ports import free_ports
from astracli.weights.publish.publisher import Publisher
from astracli.weights.receive.subscriber import Subscriber

__all__ = ["hub"]

FAKE = Path(__file__).parent / "fake_sglang"
OPTIONS = Options(FAKE / "sglang")
Weights = dict[str, torch.Tensor]


def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir(exist_ok=True)
    assert QWEN3_5.tiny_config is not None
    (path / "config.json").write_text(json.dumps(QWEN3_5.tiny_config()))
    return path


def engine_config(tmp_path: Path, hub: FakeHub, mode: str = "", **changes: Any) -> EngineConfig:
    (port,) = free_ports(1, "127.0.0.1")
    config = configs.engine(run_dir=tmp_path, hub_url=hub.url, token=TOKEN, name="engine0")
    env = {"PYTHONPATH": str(FAKE), "FAKE_SGLANG": mode}
    engine = config.recipe.resources.engine.model_copy(update={"env": env})
    resources = config.recipe.resources.model_copy(update={"engine": engine})
    launch = config.recipe.launch.model_copy(update={"ready_timeout_s": 20.0})
    told = {
        "recipe": config.recipe.model_copy(update={"resources": resources, "launch": launch}),
        "model_path": model_dir(tmp_path),
        "engine": "sglang",
        "serving_attention": "triton",
        "linear_attention": "triton",
        "port": port,
        "stage_dir": tmp_path / "stage" / "engine0",
        "published": True,
        "staging": "gpu",
    }
    return config.model_copy(update=told | changes)


@contextmanager
def process(config: EngineConfig) -> Iterator[subprocess.Popen[str]]:
    path = config.run_dir / "engine0.json"
    path.write_text(config.model_dump_json())
    (config.run_dir / "config").mkdir(exist_ok=True)
    started = subprocess.Popen(
        [sys.executable, "-m", "astracli.engines.sglang.server", str(path)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def ended(config: EngineConfig) -> tuple[int, str]:
    """(exit code, output) of the same process, forked from one that has imported what it needs."""
    path = config.run_dir / "engine0.json"
    path.write_text(config.model_dump_json())
    (config.run_dir / "config").mkdir(exist_ok=True)
    done = warm.run(["-m", "astracli.engines.sglang.server", str(path)], timeout=60)
    return done.returncode, done.stdout + done.stderr


def until(ready: Any, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_ready(hub: FakeHub) -> bool:
    return any(body["state"] == "ready" for body in hub.bodies)


def server_of(watcher: subprocess.Popen[str]) -> psutil.Process:
    return next(c for c in psutil.Process(watcher.pid).children(recursive=True) if "runpy" in " ".join(c.cmdline()))


def weights(seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    prefix = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (32, 8), **{f"{prefix}self_attn.{n}_proj.weight": s for n, s in
              (("q", (16, 8)), ("k", (4, 8)), ("v", (4, 8)))}}  # fmt: skip
    found = {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}
    return found | {prefix + "linear_attn.A_log": torch.randn(4, generator=draw)}


def test_versions_reach_a_server_that_started_without_weights(tmp_path: Path, hub: FakeHub) -> None:
    config = engine_config(tmp_path, hub)
    stage = config.stage_dir
    publisher = Publisher(tmp_path / "weights", transfer="delta", full_interval=100, keep=9, model_name="m")
    publisher.publish(0, weights(0))
    files = WeightServer(tmp_path / "weights")

    async def follow() -> None:
        with contextlib.closing(Subscriber(files.url, WEIGHTS_TOKEN, stage, tmp_path)) as subscriber:
            async with SglangClient(f"http://127.0.0.1:{config.port}", TOKEN, stage_dir=stage) as client:
                assert (await client.model_info())["weight_version"] == "-1"
                subscriber.fetch(0, None)
                first = await client.apply_staged(0)
                assert first.success and {"decode_s", "apply_s", "verify_s"} <= first.seconds.keys()
                await client.settle()
                assert (await client.model_info())["weight_version"] == "0"
                publisher.publish(1, weights(1))
                assert subscriber.fetch(1, 0).kind == "delta"
                assert (await client.apply_staged(1)).success
                (result,) = await client.generate([GenRequest([1, 2], 1, seed=1 << 63, rid="a")])
                assert (result.tokens.tolist(), result.version) == ([5], 1)

                publisher.publish(2, weights(2))
                subscriber.fetch(2, 0)  # a delta for weights that the engine does not hold
                refused = await client.apply_staged(2)
                assert not refused.success and "the engine holds 1" in refused.message
                assert (await client.model_info())["weight_version"] == "-1"
                subscriber.fetch(2, None)
                full = await client.apply_staged(2)
                assert full.success and full.outcome["staging"] == "gpu", "as the engine was told"
                assert (await client.model_info())["weight_version"] == "2"

                await client.set_version(-2)  # the stand-in then answers as SGLang does to a call that an abort met
                (result,) = await client.generate([GenRequest([1, 2], 1, rid="b")])
                assert result.finish_reason == "abort" and not len(result.tokens)

    with process(config) as watcher:
        until(lambda: is_ready(hub))
        asyncio.run(follow())
        server = server_of(watcher)
        watcher.send_signal(signal.SIGTERM)
        output, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 143
    assert TOKEN not in output and "api_key='***'" in output
    until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    files.stop()
    publisher.close()
    recorded = json.loads((tmp_path / "environments" / "engine0.json").read_text())
    assert not recorded["missing"] and recorded["package"] == str(FAKE / "sglang")
    trainer = json.loads((tmp_path / "environments" / "trainer.json").read_text())
    assert "sglang" in trainer["missing"] and trainer["versions"]["torch"] == recorded["versions"]["torch"]


@pytest.mark.parametrize(
    ("mode", "words", "hint"),
    [
        ("oom", "ended with exit code 1: the GPU ran out of memory", "max_running_requests"),
        ("late", "ended with exit code 1: the model produced NaN", "weights that it was given"),
        (
            "cuda",
            "ended with exit code 1: the GPU reported an error: an illegal memory access",
            "attention_backend=triton",
        ),
        ("kernel", "ended with exit code 1: a compiled package of its environment does not load", "engine.python"),
        ("quiet", "ended with exit code 7", "log"),
        ("mute", "was not ready within 2 s", "log"),
    ],
)
def test_a_server_that_fails_ends_the_process_with_its_reason(
    tmp_path: Path, hub: FakeHub, mode: str, words: str, hint: str
) -> None:
    config = engine_config(tmp_path, hub, mode)
    if mode == "mute":
        launch = config.recipe.launch.model_copy(update={"ready_timeout_s": 2.0})
        config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"launch": launch})})
    code, output = ended(config)
    assert code == 1, output
    assert f"error: engine0 {words}" in output
    assert hint in output.rpartition("hint: ")[2]


@pytest.mark.parametrize("mode", ["answers", "compiler"])
def test_sampling_kernels_are_compiled_before_the_engine_is_ready(tmp_path: Path, hub: FakeHub, mode: str) -> None:
    """Greedy samples beside drawn ones: SGLang compiles flashinfer's kernels at the first such batch."""
    config = engine_config(tmp_path, hub, mode)
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


def test_a_killed_watcher_takes_its_server_along(tmp_path: Path, hub: FakeHub) -> None:
    with process(engine_config(tmp_path, hub, "idle")) as watcher:
        until(lambda: is_ready(hub))
        server = server_of(watcher)
        watcher.kill()
        until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_an_environment_without_sglang_is_named(tmp_path: Path, hub: FakeHub) -> None:
    config = engine_config(tmp_path, hub)
    engine = config.recipe.resources.engine.model_copy(update={"env": {"PYTHONPATH": str(tmp_path)}})
    resources = config.recipe.resources.model_copy(update={"engine": engine})
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"resources": resources})})
    code, output = ended(config)
    assert code == 1, output
    assert f"the engine's environment (`{sys.executable}`) lacks sglang" in output


def test_command_line(tmp_path: Path, hub: FakeHub) -> None:
    config = engine_config(tmp_path, hub)
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
    config = engine_config(tmp_path, hub)
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
    config: Any = engine_config(tmp_path, hub)
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
