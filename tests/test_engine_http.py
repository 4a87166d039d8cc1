"""The embedded engine over real HTTP: generation, abort, refusals; and as a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import configs
import httpx
import numpy as np
import pytest
import warm
from engine_models import reference_logprobs
from engine_server import TOKEN, engine_of, long_requests, running, save, slow, with_client

from astracli.adapters.qwen2 import ADAPTER as QWEN2
from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.config.recipe import Recipe
from astracli.engines.client import EngineClient
from astracli.engines.contract import Ended, GenRequest, GenResult
from astracli.errors import RunFailed
from astracli.models.adapter import ModelAdapter
from astracli.process.ports import bind


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind, adapter", [("qwen3_5", QWEN3_5), ("qwen2", QWEN2)])
def test_generate_answers_tokens_logprobs_version_and_finish_reason(
    kind: str, adapter: ModelAdapter, tmp_path: Path
) -> None:
    engine = engine_of(save(tmp_path / "m", kind), adapter)
    trainer = adapter.load_for_training(tmp_path / "m", attention="sdpa")

    async def scenario(client: EngineClient) -> None:
        requests = [GenRequest([3 + i, 9, 4], 12, seed=i, stop_token_ids=[1, 2], rid=f"r{i}") for i in range(15)]
        results = await client.generate(requests)
        assert [result.rid for result in results] == [f"r{i}" for i in range(15)]
        for request, result in zip(requests, results, strict=True):
            assert result.tokens.dtype == np.int32 and result.logprobs.dtype == np.float32
            expected = reference_logprobs(trainer, list(request.input_ids), result.tokens.tolist())
            assert result.logprobs == pytest.approx(expected, abs=2e-5)
            assert (result.version, result.version_start) == (0, 0)
            assert result.finish_reason == ("stop" if result.tokens[-1] in (1, 2) else "length")
        again = await client.generate(list(reversed(requests)))
        assert [r.tokens.tolist() for r in reversed(again)] == [r.tokens.tolist() for r in results]
        info = await client.model_info()
        deadline = time.monotonic() + 60.0
        while info["running"] and time.monotonic() < deadline:  # a slot is freed after its answer has left
            await asyncio.sleep(0.01)
            info = await client.model_info()
        assert info["weight_version"] == "0" and info["serving"] is True and info["running"] == 0

    with_client(engine, scenario)


def test_a_single_prompt_answers_a_single_object_in_sglang_form(checkpoint: Path) -> None:
    with running(engine_of(checkpoint)) as url:
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}}
        reply = httpx.post(f"{url}/generate", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    answer = reply.json()
    assert len(answer["output_ids"]) == 3
    assert [entry[1:] for entry in answer["meta_info"]["output_token_logprobs"]] == [
        [token, None] for token in answer["output_ids"]
    ]
    assert answer["meta_info"]["finish_reason"] == {"type": "length"}
    assert answer["meta_info"]["weight_version"] == "0"


def test_requests_without_the_token_are_refused(checkpoint: Path) -> None:
    with running(engine_of(checkpoint)) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            for method, route in (("GET", "/health_generate"), ("GET", "/model_info"), ("POST", "/generate")):
                assert httpx.request(method, url + route, headers=headers).status_code == 401

        async def wrong() -> None:
            async with EngineClient(url, "wrong", name="engine7") as client:
                await client.wait_ready(5)

        with pytest.raises(RunFailed, match=f"engine7 at {url} refused the run's token"):
            asyncio.run(wrong())


@pytest.mark.parametrize(
    "body, message",
    [
        ({"input_ids": [4] * 64}, "the prompt has 64 tokens, the engine's context is 64"),
        ({"input_ids": []}, "input_ids must be"),
        ({"input_ids": [[]]}, "non-empty list"),
        ({"input_ids": [32]}, "[0, 32)"),
        ({"input_ids": [3], "sampling_params": {"top_k": 5}}, "top_k"),
        ({"input_ids": [3], "sampling_params": {"temperature": -1}}, "temperature -1.0"),
        ({"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p 0.0"),
        ({"input_ids": [3], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens 0"),
        ({"input_ids": [[3], [4]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ({"input_ids": ["a"]}, "malformed request"),
        ({"input_ids": [3], "draw_offset": 10**30}, "draw_offset"),
        ({"input_ids": [3], "sampling_params": 5}, "must be an object"),
        ({"input_ids": [3], "rid": "é"}, "request id"),
    ],
)
def test_bad_requests_are_named(checkpoint: Path, body: dict[str, Any], message: str) -> None:
    with running(engine_of(checkpoint)) as url:
        reply = httpx.post(f"{url}/generate", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]


def test_a_budget_beyond_the_context_is_cut(checkpoint: Path) -> None:
    async def scenario(client: EngineClient) -> None:
        prompt = list(range(3, 13))
        (whole,) = await client.generate([GenRequest(prompt, 500, seed=3)])
        assert whole.finish_reason == "stop" or (whole.finish_reason == "length" and len(whole.tokens) == 54)
        with pytest.raises(RunFailed, match=r"engine0 at .* the prompt has 70 tokens"):
            await client.generate([GenRequest([4] * 70, 1)])

    with_client(engine_of(checkpoint), scenario)


def test_abort_returns_partial_tokens_and_a_continuation_completes_them(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)

    async def scenario(client: EngineClient) -> None:
        requests = [GenRequest([3 + i, 5], 40, seed=i, rid=f"r{i}") for i in range(4)]
        whole = await client.generate(requests)
        async with slow(engine):
            task = asyncio.create_task(client.generate(requests))
            await asyncio.sleep(0.25)
            await client.abort_all()
            parts = await task
        assert any(part.finish_reason == "abort" and 0 < len(part.tokens) < 40 for part in parts)
        for request, part, expected in zip(requests, parts, whole, strict=True):
            tokens, logprobs = part.tokens, part.logprobs
            if part.finish_reason == "abort":
                assert len(part.tokens) == len(part.logprobs)
                rest = GenRequest(
                    [*request.input_ids, *part.tokens.tolist()],
                    40 - len(part.tokens),
                    seed=request.seed,
                    draw_offset=len(part.tokens),
                )
                (second,) = await client.generate([rest])
                tokens = np.concatenate([tokens, second.tokens])
                logprobs = np.concatenate([logprobs, second.logprobs])
            assert tokens.tolist() == expected.tokens.tolist()
            assert logprobs == pytest.approx(expected.logprobs, abs=2e-5)

    with_client(engine, scenario)


def test_results_come_as_requests_end_and_equal_those_of_one_answer(checkpoint: Path) -> None:
    """Ten requests of up to 40, 36, .. 4 tokens in six slots; the shortest of the first six is told first."""
    engine = engine_of(checkpoint)

    async def scenario(client: EngineClient) -> None:
        prompts = [[3 + i, 9, 4] for i in range(10)]
        requests = [GenRequest(p, 40 - 4 * i, seed=i, rid=f"r{i}") for i, p in enumerate(prompts)]
        whole = await client.generate(requests)
        told: list[tuple[int, int]] = []

        def ended(place: int, result: GenResult) -> None:
            told.append((place, len(result.tokens)))

        parts = await client.generate(requests, ended)
        assert [r.rid for r in parts] == [f"r{i}" for i in range(10)]
        for one, other in zip(parts, whole, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and one.finish_reason == other.finish_reason
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert sorted(told) == [(i, len(r.tokens)) for i, r in enumerate(whole)]
        lengths = [len(r.tokens) for r in whole]
        assert told[0][0] == min(range(6), key=lambda place: lengths[place]) and told[-1][1] > told[0][1]

    with_client(engine, scenario)


@pytest.mark.parametrize("ended", [None, lambda place, result: None], ids=["whole", "streamed"])
def test_a_client_that_hangs_up_frees_its_slots(checkpoint: Path, ended: Ended | None) -> None:
    engine = engine_of(checkpoint)

    async def scenario(client: EngineClient) -> None:
        async with slow(engine):
            hasty = asyncio.create_task(client.generate(long_requests(3), ended))
            await asyncio.sleep(0.2)
            assert (await client.model_info())["running"] > 0
            hasty.cancel()
            for _ in range(50):
                if (await client.model_info())["running"] == 0:
                    return
                await asyncio.sleep(0.02)
        raise AssertionError("the slots stay occupied")

    with_client(engine, scenario)


def test_an_engine_that_is_not_there_is_named() -> None:
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()

    async def go() -> None:
        async with EngineClient(url, TOKEN, name="engine3") as client:
            assert not await client.health()
            with pytest.raises(RunFailed, match=f"engine3 at {url} was not ready within 0.2 s"):
                await client.wait_ready(0.2)
            with pytest.raises(RunFailed, match=f"engine3 at {url} is gone"):
                await client.generate(long_requests(1))

    asyncio.run(go())


# -- the process


class _Hub(BaseHTTPRequestHandler):
    """A hub that says yes to every heartbeat."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"stop": false}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _config(tmp_path: Path, model: Path, hub: str, port: int) -> Path:
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"source": "arithmetic"},
            "rollout": {"max_new_tokens": 16, "context_length": 64, "max_running_requests": 8},
            "train": {"steps": 1},
        }
    )
    config = configs.engine(
        run_dir=tmp_path, hub_url=hub, token=TOKEN, recipe=recipe, model_path=model, port=port,
        stage_dir=tmp_path / "stage",
    )  # fmt: skip
    path = tmp_path / "engine0.json"
    path.write_text(config.model_dump_json())
    return path


def _free_port() -> int:
    listener = bind("127.0.0.1", 0)
    port: int = listener.getsockname()[1]
    listener.close()
    return port


def test_the_process_serves_and_ends_on_sigterm(checkpoint: Path, tmp_path: Path) -> None:
    async def use(url: str, child: warm.Child) -> int:
        async with EngineClient(url, TOKEN) as client:
            while not await client.health():
                assert child.poll() is None, "the engine ended before it was ready"
                await asyncio.sleep(0.1)
            return len(await client.generate([GenRequest([5, 6], 4, seed=i) for i in range(12)]))

    with _hub() as hub:
        port = _free_port()
        words = ["-m", "astracli.engines.embedded.process", str(_config(tmp_path, checkpoint, hub, port))]
        child = warm.start(words, tmp_path / "log")
        try:
            assert asyncio.run(use(f"http://127.0.0.1:{port}", child)) == 12
            os.kill(child.pid, signal.SIGTERM)
            assert child.wait(timeout=60) == 143
        finally:
            warm.end(child)
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_taken_port_ends_the_process_with_a_message(checkpoint: Path, tmp_path: Path) -> None:
    with _hub() as hub:
        taken = bind("127.0.0.1", 0)
        taken.listen()
        port = taken.getsockname()[1]
        words = ["-m", "astracli.engines.embedded.process", str(_config(tmp_path, checkpoint, hub, port))]
        done = warm.run(words, timeout=60)
        taken.close()
    assert done.returncode == 1
    assert f"error: cannot bind 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "hint:" in done.stderr and "Traceback" not in done.stderr
