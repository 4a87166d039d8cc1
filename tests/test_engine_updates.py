"""Weight updates of the embedded engine: pause modes, staged deltas, failure and resync, rounding."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import reference_logprobs, tiny_model
from engine_server import TOKEN, engine_of, long_requests, save, slow, with_client
from starlette.applications import Starlette
from starlette.routing import Mount

from astracli.adapters.qwen3_5 import ADAPTER as QWEN3_5
from astracli.engines.client import EngineClient
from astracli.engines.contract import UpdateReply
from astracli.errors import RunFailed
from astracli.process.ports import bind
from astracli.process.server import ServerThread
from astracli.weights.publish.publisher import Publisher
from astracli.weights.publish.server import weights_app
from astracli.weights.receive.subscriber import Subscriber


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@contextmanager
def published(tmp_path: Path) -> Iterator[tuple[Publisher, Subscriber]]:
    """A publisher, and a subscriber that fetches from it over HTTP into the stage directory."""
    publisher = Publisher(tmp_path / "weights", full_interval=100)
    server = ServerThread(Starlette(routes=[Mount("/weights", weights_app(tmp_path / "weights"))]), bind()).start()
    subscriber = Subscriber(server.url, TOKEN, tmp_path / "stage", wait_s=5)
    yield publisher, subscriber
    subscriber.close()
    server.stop()
    publisher.close()


def _wire(model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    wire = QWEN3_5.wire_tensors(model)
    return {tensor.name: parameters[name].detach().to(getattr(torch, tensor.dtype)) for name, tensor in wire.items()}


async def _update(client: EngineClient, tmp_path: Path, version: int, weights: dict[str, torch.Tensor]) -> UpdateReply:
    """Publish, stage and apply a full version."""
    with published(tmp_path) as (publisher, subscriber):
        publisher.publish(version, weights)
        assert subscriber.fetch(version).kind == "full"
        return await client.apply_staged(version)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_pause_update_continue(checkpoint: Path, tmp_path: Path, mode: Any) -> None:
    engine = engine_of(checkpoint, stage_dir=tmp_path / "stage")
    reference = QWEN3_5.load_for_training(save(tmp_path / "other", seed=7), attention="sdpa")

    async def scenario(client: EngineClient) -> None:
        async with slow(engine):
            task = asyncio.create_task(client.generate(long_requests(4)))
            await asyncio.sleep(0.2)
            await client.pause(mode)
            if mode == "abort":
                parts = await task
                assert {(part.version, part.finish_reason) for part in parts} <= {(0, "abort"), (0, "stop")}
            update = await _update(client, tmp_path, 5, _wire(reference))
            assert update.success, update.message
            waiting = asyncio.create_task(client.generate(long_requests(1)))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await client.resume()
            (fresh,) = await waiting
        assert (fresh.version, fresh.version_start) == (5, 5)
        expected = reference_logprobs(reference, [3, 5, 7], fresh.tokens.tolist())
        assert fresh.logprobs == pytest.approx(expected, abs=2e-5)
        if mode != "abort":
            kept = [result for result in await task if result.version == 5]
            assert kept and all(result.version_start == 0 for result in kept)
        assert (await client.model_info())["weight_version"] == "5"

    with_client(engine, scenario)


def test_a_failed_update_stops_serving_until_a_good_one(checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_of(checkpoint, stage_dir=tmp_path / "stage")
    wrong = {name: tensor.detach().bfloat16() for name, tensor in tiny_model("llama").named_parameters()}
    good = _wire(tiny_model("qwen3_5", 3))

    async def scenario(client: EngineClient) -> None:
        update = await _update(client, tmp_path, 1, wrong)
        assert not update.success and "model.layers" in update.message
        with pytest.raises(RunFailed, match="503: not serving: the update to version 1 failed"):
            await client.generate(long_requests(1))
        info = await client.model_info()
        assert (info["serving"], info["weight_version"]) == (False, "0")
        assert await client.health()
        assert engine.weights.have is None
        assert (await _update(client, tmp_path, 2, good)).success
        (result,) = await client.generate(long_requests(1))
        assert result.version == 2

    with_client(engine, scenario)


def test_generate_waits_for_an_engine_that_awaits_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_of(checkpoint, problem="waiting for its weights", stage_dir=tmp_path / "stage")

    async def scenario(client: EngineClient) -> None:
        client.not_serving_s = 30.0
        task = asyncio.create_task(client.generate(long_requests(1)))
        await asyncio.sleep(0.3)
        assert not task.done()
        assert (await _update(client, tmp_path, 4, _wire(tiny_model("qwen3_5")))).success
        (result,) = await task
        assert result.version == 4

    with_client(engine, scenario)


def test_weights_are_wire_rounded_in_fp32(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5")
    model.save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    served = dict(engine.scheduler.decoder.model.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter if "A_log" in name else parameter.bfloat16().float()
        assert served[name].dtype == torch.float32
        assert torch.equal(served[name], expected), name
    assert not torch.equal(model.model.norm.weight + 1e-3, (model.model.norm.weight + 1e-3).bfloat16().float())


def test_staged_deltas_are_applied_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_of(checkpoint, stage_dir=tmp_path / "stage")
    model = QWEN3_5.load_for_training(checkpoint, attention="sdpa")

    def train(version: int) -> None:
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    async def scenario(client: EngineClient) -> None:
        with published(tmp_path) as (publisher, subscriber):
            publisher.publish(0, _wire(model))
            for version in (1, 2):
                train(version)
                assert publisher.publish(version, _wire(model)).bytes_delta > 0
                assert subscriber.fetch(version, version - 1).kind == "delta"
                if version == 2:
                    await asyncio.sleep(0.3)  # time to decode it ahead
                update = await client.apply_staged(version)
                assert update.success, update.message
                assert set(update.seconds) == {"decode_s", "apply_s", "verify_s", "write_s"}
                assert update.outcome["changed"] > 0
                (result,) = await client.generate(long_requests(1))
                assert result.version == version
            for name, expected in _wire(model).items():
                assert torch.equal(engine.weights.copies[name], expected), name
                assert torch.equal(engine.weights.parameters[name], expected.float()), name

            train(3)
            publisher.publish(3, _wire(model))
            subscriber.fetch(3, 2)
            next(iter(engine.weights.copies.values())).view(-1)[5] += 1.0  # a base that is not what it should be
            update = await client.apply_staged(3)
            assert not update.success and "digest" in update.message
            with pytest.raises(RunFailed, match="not serving: the update to version 3 failed"):
                await client.generate(long_requests(1))
            assert not (await client.apply_staged(3)).success
            assert subscriber.fetch(3, None).kind == "full"
            assert not (await client.apply_staged(4)).success
            update = await client.apply_staged(3)
            assert update.success, update.message
            (result,) = await client.generate(long_requests(1))
            assert result.version == 3
            for name, expected in _wire(model).items():
                assert torch.equal(engine.weights.copies[name], expected), name

    with_client(engine, scenario)


def test_parameters_are_read_back_after_an_update_and_others_than_the_trainers_stop_the_engine(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(checkpoint, stage_dir=tmp_path / "stage", verify_interval=2)
    weights, model = engine.weights, QWEN3_5.load_for_training(checkpoint, attention="sdpa")
    write = weights.write_parameters

    def wrongly() -> None:
        """The copies are right, which is all that the digests in the pause can see; less than bf16 can tell is not."""
        write()
        with torch.no_grad():
            weights.parameters["model.norm.weight"].view(-1)[3] += 1e-6

    async def scenario(client: EngineClient) -> None:
        with published(tmp_path) as (publisher, subscriber):
            publisher.publish(0, _wire(model))
            for version in (1, 2, 3):
                with torch.no_grad():
                    model.model.norm.weight += 0.5
                publisher.publish(version, _wire(model))
                subscriber.fetch(version, version - 1)
                update = await client.apply_staged(version)
                assert update.success and update.outcome["readback"] == (version == 2), update
                if version == 2:
                    assert subscriber.readback(2).keys() == {"readback_s"}
            with torch.no_grad():
                model.model.norm.weight[0] = float("nan")
            publisher.publish(4, _wire(model))
            monkeypatch.setattr(weights, "write_parameters", wrongly)
            subscriber.fetch(4, 3)
            assert (await client.apply_staged(4)).success
            with pytest.raises(RunFailed, match=r"version 4: read back .* 1 tensors differ: model\.norm\.weight"):
                subscriber.readback(4)
            with pytest.raises(RunFailed, match="not serving: the update to version 4 failed: read back"):
                await client.generate(long_requests(1))
            monkeypatch.setattr(weights, "write_parameters", write)
            assert not (await client.apply_staged(4)).success, "nobody knows what it holds"
            assert subscriber.fetch(4, None).kind == "full"
            assert (await client.apply_staged(4)).success and subscriber.readback(4)

    with_client(engine, scenario)
