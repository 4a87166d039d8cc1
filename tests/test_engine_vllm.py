"""vLLM's server and the process that watches it: real processes, a stand-in for vLLM itself (tests/fake_vllm)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from foreign_engines import is_ready, process, until, vllm_config
from listeners import listening
from staged_tools import chain, delta, restage, stage, wait_for
from test_workers_common import TOKEN, FakeHub, hub

from astracli.engines.client import EngineClient
from astracli.engines.contract import UNPROVEN, GenRequest
from astracli.engines.vllm.server import engine_arguments, logprobs_mode
from astracli.errors import RunFailed
from astracli.process import connections
from astracli.process.config import EngineConfig
from astracli.weights.receive.subscriber import Subscriber

__all__ = ["hub"]

FAKE = f"{Path(__file__).parent / 'fake_vllm'}{os.pathsep}{Path(__file__).parent}"


def request(rid: str, tokens: int, **more: Any) -> GenRequest:
    return GenRequest([1, 2, 3], tokens, rid=rid, **more)


async def conversation(config: EngineConfig, where: Path, root: Path) -> None:
    async with EngineClient(f"http://127.0.0.1:{config.port}", TOKEN) as client:
        before = await client.model_info()
        assert (before["weight_version"], before["serving"]) == ("-1", False)
        with contextlib.closing(Subscriber("http://127.0.0.1:1", TOKEN, where, root)) as subscriber:
            subscriber.wake(UNPROVEN)  # as a rollout worker does, so that the loader runs before the first pause
        await client.pause()
        assert not (await client.apply_staged(UNPROVEN)).success
        await client.resume()
        assert (await client.model_info())["problem"] == "waiting for its weights"
        restage(root, ["v000000/manifest.full.json"])
        early = asyncio.create_task(client.generate([request("early", 2)]))  # waits for the first weights
        await asyncio.sleep(0.2)
        assert not early.done()

        first = await client.update(0, "abort", flush=True)
        assert first.success and first.outcome["kind"] == "full" and first.outcome["readback"]
        assert json.loads(wait_for(where / "readback.json"))["ok"]
        (result,) = await early
        assert (result.tokens.tolist(), result.logprobs.tolist(), result.version) == ([5, 5], [-0.5, -0.5], 0)

        ended: list[int] = []
        asked = [request("long", 9), request("stops", 9, stop_token_ids=(5,)), request("short", 1)]
        results = await client.generate(asked, lambda place, _: ended.append(place))
        assert [len(one.tokens) for one in results] == [9, 1, 1] and ended[-1] == 0
        assert [one.finish_reason for one in results] == ["length", "stop", "length"]

        for version, mode in ((1, "in_place"), (2, "retract"), (3, "abort")):
            under_way = asyncio.create_task(client.generate([request(f"kept{version}", 200)]))
            await asyncio.sleep(0.1)
            restage(root, [delta(version)])
            reply = await client.update(version, mode, flush=mode == "abort")  # type: ignore[arg-type]
            assert reply.success and reply.outcome["kind"] == "delta" and reply.outcome["pause_s"] > 0
            assert json.loads(wait_for(where / "readback.json"))["ok"]
            (kept,) = await under_way
            if mode == "abort":
                assert kept.finish_reason == "abort" and 0 < len(kept.tokens) < 200 and kept.version == version - 1
            else:
                assert (len(kept.tokens), kept.version_start, kept.version) == (200, version - 1, version)

        await client.pause()
        held = asyncio.create_task(client.generate([request("held", 1)]))
        await asyncio.sleep(0.1)
        assert not held.done(), "a pause holds new requests"
        await client.resume()
        assert (await held)[0].finish_reason == "length"

        await client.pause()
        await client.release_memory()
        await client.resume_memory()
        assert (await client.model_info())["paused"], "waking does not end a pause"
        await client.resume()

        with pytest.raises(RunFailed, match="the engine's context is"):
            await client.generate([GenRequest([1] * 300_000, 1, rid="huge")])
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as plain:
            assert (await plain.post(f"{client.url}/unknown", json={})).status_code == 404


def test_a_server_is_used_from_its_first_weights_to_its_last(tmp_path: Path, hub: FakeHub) -> None:
    config = vllm_config(tmp_path, hub)
    where = stage(tmp_path, chain(6), ["v000000/manifest.full.json"], transfer="delta", full_interval=5)
    with process(config) as watcher:
        try:
            until(lambda: is_ready(hub) or watcher.poll() is not None, 90)
            below = psutil.Process(watcher.pid).children(recursive=True)
            assert {address for address, _ in listening(one.pid for one in below)} == {"127.0.0.1"}
            strangers(config.port)
            asyncio.run(conversation(config, where, tmp_path))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGTERM)
            output, _ = watcher.communicate(timeout=60)
            print(output)
    assert TOKEN not in output and "listens at" not in output


def strangers(port: int) -> None:
    """The guards of the server are those of the run's other servers (tests/test_access.py has what they do)."""
    url, token = f"http://127.0.0.1:{port}/model_info", {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers=token | {"Origin": "http://evil.test"}).status_code == 403
    assert httpx.get(url, headers=token | {"Host": "evil.test"}).status_code == 421
    with contextlib.ExitStack() as held:
        for _ in range(connections.MOST + 50):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        assert httpx.get(url, headers=token).status_code == 200


def test_a_server_that_listens_elsewhere_is_said(tmp_path: Path, hub: FakeHub) -> None:
    with process(vllm_config(tmp_path, hub, "open")) as watcher:
        until(lambda: is_ready(hub) or watcher.poll() is not None, 90)
        os.killpg(watcher.pid, signal.SIGTERM)
        output, _ = watcher.communicate(timeout=60)
    assert re.search(r"warning: engine0: vLLM listens at (\[::\]|0\.0\.0\.0):\d+, without the run's token", output)


def test_arguments(tmp_path: Path, hub: FakeHub) -> None:
    config = vllm_config(tmp_path, hub)
    found = engine_arguments(config, Path("/m"))
    assert (found["load_format"], found["skip_tokenizer_init"], found["enable_sleep_mode"]) == ("dummy", True, True)
    assert "attention_backend" not in found and TOKEN not in json.dumps(found)
    assert found["enable_prefix_caching"]
    without = config.model_copy(update={"prefix_cache": False})
    assert not engine_arguments(without, Path("/m"))["enable_prefix_caching"]
    assert (logprobs_mode(1.0), logprobs_mode(0.6)) == ("raw_logprobs", "processed_logprobs")
