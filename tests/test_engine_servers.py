"""What the servers of SGLang and vLLM have in common: one test body, both engines (tests/foreign_engines.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import psutil
import pytest
from foreign_engines import CONFIGS, HERE, ended, is_ready, process, server_of, until
from staged_tools import Weights, chain
from test_engine_sglang import weights
from test_workers_common import TOKEN, FakeHub, hub
from transfer_tools import TOKEN as WEIGHTS_TOKEN
from transfer_tools import Server as WeightServer

from astracli.engines import registry
from astracli.engines.contract import GenRequest
from astracli.engines.sglang.client import SglangClient
from astracli.weights.publish.publisher import Publisher
from astracli.weights.receive.subscriber import Subscriber

__all__ = ["hub"]

BOTH = pytest.mark.parametrize("engine", sorted(CONFIGS))


def versions(engine: str) -> list[Weights]:
    """Of the model that the stand-in holds."""
    return [weights(seed) for seed in range(3)] if engine == "sglang" else chain(3)


@BOTH
def test_versions_reach_a_server_that_started_without_weights(engine: str, tmp_path: Path, hub: FakeHub) -> None:
    config = CONFIGS[engine](tmp_path, hub)
    stage, made = config.stage_dir, versions(engine)
    publisher = Publisher(tmp_path / "weights", transfer="delta", full_interval=100, keep=9, model_name="m")
    publisher.publish(0, made[0])
    files = WeightServer(tmp_path / "weights")

    async def follow() -> None:
        url = f"http://127.0.0.1:{config.port}"
        with contextlib.closing(Subscriber(files.url, WEIGHTS_TOKEN, stage, tmp_path)) as subscriber:
            async with registry.get(engine).client(url, TOKEN, name="engine0", stage_dir=stage) as client:
                assert (await client.model_info())["weight_version"] == "-1"
                subscriber.fetch(0, None)
                first = await client.update(0, "abort", flush=True)
                assert first.success and {"decode_s", "apply_s", "verify_s", "pause_s"} <= first.seconds.keys()
                assert (await client.model_info())["weight_version"] == "0"
                publisher.publish(1, made[1])
                assert subscriber.fetch(1, 0).kind == "delta"
                assert (await client.update(1, "abort", flush=True)).success
                (result,) = await client.generate([GenRequest([1, 2], 1, seed=1 << 63)])
                assert (result.tokens.tolist(), result.version) == ([5], 1)
                publisher.publish(2, made[2])
                subscriber.fetch(2, 0)  # a delta for weights that the engine does not hold
                refused = await client.update(2, "abort", flush=True)
                assert not refused.success and "the engine holds 1" in refused.message
                assert engine != "sglang" or (await client.model_info())["weight_version"] == "-1", "a label of its own"
                subscriber.fetch(2, None)
                await client.resume()
                full = await client.update(2, "abort", flush=True)
                assert full.success and full.outcome["staging"] == config.staging, "as the engine was told"
                (result,) = await client.generate([GenRequest([1, 2], 1)])
                assert result.version == 2
                if isinstance(client, SglangClient):
                    await client.settle()
                    await client.set_version(-2)  # its stand-in then answers as SGLang does to a call that an abort met
                    (result,) = await client.generate([GenRequest([1, 2], 1)])
                    assert result.finish_reason == "abort" and not len(result.tokens)

    with process(config) as watcher:
        until(lambda: is_ready(hub) or watcher.poll() is not None, 90)
        asyncio.run(follow())
        server = server_of(watcher)
        watcher.send_signal(signal.SIGTERM)
        output, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 143 and TOKEN not in output
    assert engine != "sglang" or "api_key='***'" in output
    until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    files.stop()
    publisher.close()
    recorded = json.loads((tmp_path / "environments" / "engine0.json").read_text())
    assert not recorded["missing"] and recorded["package"] == str(HERE / f"fake_{engine}" / engine)
    trainer = json.loads((tmp_path / "environments" / "trainer.json").read_text())
    assert engine in trainer["missing"] and trainer["versions"]["torch"] == recorded["versions"]["torch"]


@pytest.mark.parametrize(
    ("engine", "mode", "words", "hint"),
    [
        ("sglang", "oom", "ended with exit code 1: the GPU ran out of memory", "max_running_requests"),
        ("sglang", "late", "ended with exit code 1: the model produced NaN", "weights that it was given"),
        (
            "sglang",
            "cuda",
            "ended with exit code 1: the GPU reported an error: an illegal memory access",
            "attention_backend=triton",
        ),
        (
            "sglang",
            "kernel",
            "ended with exit code 1: a compiled package of its environment does not load",
            "engine.python",
        ),
        ("sglang", "quiet", "ended with exit code 7", "log"),
        ("sglang", "mute", "was not ready within 2 s", "log"),
        ("vllm", "oom", "ended with exit code 1: the GPU ran out of memory", "max_running_requests"),
        ("vllm", "late", "ended with exit code 1: the GPU reported an error", "attention_backend=triton_attn"),
        ("vllm", "quiet", "ended with exit code 7", "log"),
    ],
)
def test_a_server_that_fails_ends_the_process_with_its_reason(
    tmp_path: Path, hub: FakeHub, engine: str, mode: str, words: str, hint: str
) -> None:
    config = CONFIGS[engine](tmp_path, hub, mode)
    if mode == "mute":
        launch = config.recipe.launch.model_copy(update={"ready_timeout_s": 2.0})
        config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"launch": launch})})
    code, output = ended(config)
    assert code == 1, output
    assert f"error: engine0 {words}" in output
    assert hint in output.rpartition("hint: ")[2]


def test_a_killed_watcher_takes_its_server_along(tmp_path: Path, hub: FakeHub) -> None:
    """By the kernel, whatever the server is."""
    with process(CONFIGS["sglang"](tmp_path, hub, "idle")) as watcher:
        until(lambda: is_ready(hub))
        server = server_of(watcher)
        watcher.kill()
        until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


@BOTH
def test_an_environment_without_the_engine_is_named(engine: str, tmp_path: Path, hub: FakeHub) -> None:
    config = CONFIGS[engine](tmp_path, hub)
    own = config.recipe.resources.engine.model_copy(update={"env": {"PYTHONPATH": str(tmp_path)}})
    resources = config.recipe.resources.model_copy(update={"engine": own})
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"resources": resources})})
    code, output = ended(config)
    assert code == 1, output
    assert f"the engine's environment (`{sys.executable}`) lacks {engine}" in output
