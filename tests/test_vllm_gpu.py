"""A real engine on a GPU: `ASTRA_GPU_ENGINE_PYTHON=PYTHON python -m pytest -m gpu tests/test_vllm_gpu.py`, five minutes
at most. PYTHON is of the environment that holds vLLM (or ASTRA_GPU_ENGINE_PATH, its PYTHONPATH).

ASTRA_GPU_MODEL=DIR takes a checkpoint, else a small random model is made. ASTRA_GPU_ENGINE=sglang tests that one;
`embedded` needs no GPU, and shows on a CPU that these tests hold. So does the stand-in for vLLM, except of
log-probabilities: FAKE_VLLM=checkpoint ASTRA_GPU_ENGINE_PATH=tests/fake_vllm:tests, with whole paths.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from engine.rollout import TOKEN, chosen, serving
from engine.side_by_side import Bench
from weights.sglang_server import compare

from astracli.config import recipe_io
from astracli.engines import registry
from astracli.engines.client import EngineClient
from astracli.engines.contract import GenRequest, GenResult

ENGINE = os.environ.get("ASTRA_GPU_ENGINE", "vllm")
CPU = ENGINE == "embedded"
STAND_IN = "FAKE_VLLM" in os.environ
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CPU or STAND_IN or torch.cuda.is_available()), reason="needs a CUDA device"),
]
Scenario = Callable[[EngineClient], Awaitable[None]]
PROMPT = [5, 9, 4, 17, 3, 8, 11, 6, 14, 7, 10, 12, 15, 13, 16, 18] * 4


def small_model(path: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """An engine that starts from made-up weights, and a trainer that publishes for it."""
    asked = os.environ.get("ASTRA_GPU_MODEL") or str(small_model(tmp_path_factory.mktemp("model")))
    args = argparse.Namespace(
        model=asked, recipe="qwen3.5-tiny-m2po-delta", device="cpu" if CPU else "cuda", engine=ENGINE, memory_gib=None,
        attention=None, engine_path=os.environ.get("ASTRA_GPU_ENGINE_PATH"), concurrency=16, prompt_tokens=256,
        engine_python=os.environ.get("ASTRA_GPU_ENGINE_PYTHON"), new_tokens=512, lr=1e-4, full_every=3,
    )  # fmt: skip
    _, model, sets = chosen(args)
    recipe = recipe_io.load(args.recipe, [*sets, "weights.verify_interval=1", "weights.pause_mode=in_place"])
    folder = tmp_path_factory.mktemp("engine")
    with serving(recipe, model, folder, published=True, leaves=not CPU) as served:
        made = Bench(args, recipe, model, served, float("inf"))

        async def first(client: EngineClient) -> None:
            assert (await made.first(client))["kind"] == "full"

        play(made, first)
        yield made
        made.receiver.close()


def play(bench: Bench, scenario: Scenario) -> None:
    async def go() -> None:
        kind, served = registry.get(ENGINE), bench.served
        async with kind.client(served.url, TOKEN, name="engine0", stage_dir=served.stage) as client:
            await client.wait_ready(60.0)
            await scenario(client)

    asyncio.run(go())


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


async def draw(client: EngineClient, tokens: int, *, seed: int = 0, temperature: float = 1.0) -> GenResult:
    (result,) = await client.generate([GenRequest(PROMPT, tokens, temperature, seed=seed, rid=f"r{seed}")])
    return result


def test_deltas_and_full_versions_are_applied_and_read_back(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        kinds = []
        for _ in range(4):
            row = await bench.bring(client, full=(bench.version + 1) % 3 == 0)
            kinds.append(row["kind"])
            assert row["pause_ms"] > 0 and "readback_s" in row, "the read-back found the trainer's weights"
        assert sorted(set(kinds)) == ["delta", "full"]
        assert (await draw(client, 2)).version == bench.version

    play(bench, scenario)


def test_log_probabilities_are_those_of_transformers(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        found = await compare(client, bench.model, bench.trainer, bench.adapter)
        assert found["engine_version"] == bench.version
        assert found["parity_mean"] < 0.02 and found["parity_max"] < 0.3, found

    play(bench, scenario)


def test_an_abort_brings_what_was_drawn(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        asked = asyncio.create_task(draw(client, 400))
        await asyncio.sleep(0.3)
        await client.abort_all()
        result = await asyncio.wait_for(asked, 60.0)
        assert len(result.tokens) == len(result.logprobs)
        assert result.finish_reason == "abort" or len(result.tokens) == 400

    play(bench, scenario)


def test_a_pause_keeps_requests_and_an_update_goes_through_them(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        before = bench.version
        asked = [asyncio.create_task(draw(client, 400, seed=seed)) for seed in range(4)]
        await asyncio.sleep(0.2)
        await bench.bring(client, full=False)
        results = await asyncio.wait_for(asyncio.gather(*asked), 120.0)
        assert {len(result.tokens) for result in results} == {400}
        assert all(np.isfinite(result.logprobs).all() for result in results)
        assert all(result.version_start <= result.version <= before + 1 for result in results)
        await client.pause("in_place")
        held = asyncio.create_task(draw(client, 4, seed=9))
        await asyncio.sleep(0.3)
        assert not held.done(), "a pause holds new requests"
        await client.resume()
        assert len((await asyncio.wait_for(held, 60.0)).tokens) == 4

    play(bench, scenario)


@pytest.mark.skipif(ENGINE != "vllm", reason=f"{ENGINE} keeps no prefixes over updates in place")
def test_prefixes_are_found_under_the_weights_that_computed_them(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        first, second = [await draw(client, 8, temperature=0.0) for _ in range(2)]
        await bench.bring(client, full=False)
        after = await draw(client, 1, temperature=0.0)
        assert (second.cached_tokens or 0) >= 32 and after.cached_tokens == 0
        same = first.tokens == second.tokens
        assert same[0] and np.abs(first.logprobs - second.logprobs)[np.cumprod(same).astype(bool)].max() < 0.1

    play(bench, scenario)


@pytest.mark.skipif(CPU, reason="the embedded engine has no GPU to give back")
def test_an_engine_sleeps_and_wakes_with_its_weights(bench: Bench) -> None:
    async def scenario(client: EngineClient) -> None:
        before = await draw(client, 8, temperature=0.0)
        free = free_bytes()
        await client.pause("abort")
        await client.settle()
        await client.release_memory()
        assert STAND_IN or free_bytes() > free, "its memory is free"
        await client.resume_memory()
        await client.resume()
        after = await draw(client, 8, temperature=0.0)
        assert np.abs(before.logprobs[:1] - after.logprobs[:1]).max() < 0.05 and after.tokens[0] == before.tokens[0]
        await bench.bring(client, full=False)

    play(bench, scenario)
