"""The prefix cache of a vLLM engine over updates: the engine in this process, a stand-in for vLLM (tests/fake_vllm)
that marks a token which attends to keys and values of other weights (log-probability -9)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staged_tools import chain, delta, restage, stage

from astracli.engines import loader
from astracli.engines.asked import Asked

FAKE = Path(__file__).parent / "fake_vllm"
PROMPT = list(range(1, 14))
Scenario = Callable[[Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("ASTRA_STAGE_DIR", str(tmp_path / "stage"))
    monkeypatch.setenv("ASTRA_START_VERSION", "")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def asked(rid: str, tokens: int, prompt: list[int] = PROMPT, stop: tuple[int, ...] = ()) -> Asked:
    return Asked(np.array(prompt, np.int64), tokens, 1.0, 1.0, stop, (), False, 0, rid, 0)


def play(scenario: Scenario, tmp_path: Path, *, cached: bool = True, slots: int = 3) -> None:
    """An engine that holds version 0; version 1 is staged."""
    from astracli.engines.vllm.names import WORKER
    from astracli.engines.vllm.serve import start

    stage(tmp_path, chain(4), ["v000000/manifest.full.json"], transfer="delta", full_interval=10)
    told = {"model": "m", "worker_extension_cls": WORKER, "enable_prefix_caching": cached, "max_model_len": 512,
            "max_num_seqs": slots, "enable_sleep_mode": True}  # fmt: skip

    async def go() -> None:
        engine = start({"engine": told, "serving": False, "seeded": True, "vocabulary": 32})
        await update(engine, 0, "abort")
        restage(tmp_path, [delta(1)])
        try:
            await scenario(engine)
        finally:
            held = loader.loaded_models[engine.llm.worker.model]
            held.watcher.close()
            held.decoder.close()

    asyncio.run(go())


async def update(engine: Any, version: int, mode: str) -> None:
    await engine.pause(mode)
    success, message, _ = await engine.apply_staged(version, flush=mode == "abort")
    assert success, message
    await engine.resume()


def told(answer: dict[str, Any]) -> tuple[set[float], int, int, int]:
    """(log-probabilities, tokens, versions of the first and the last)"""
    meta = answer["meta_info"]
    versions = int(meta["weight_version_start"]), int(meta["weight_version"])
    return {entry[0] for entry in meta["output_token_logprobs"]}, len(answer["output_ids"]), *versions


def hits(answer: dict[str, Any]) -> int:
    found: int = answer["meta_info"]["cached_tokens"]
    return found


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_no_token_attends_to_keys_and_values_of_other_weights(tmp_path: Path, mode: str) -> None:
    """Requests that have begun, that wait for a slot, that come in the pause and that come after it, all with one
    prompt, which is in the cache of the old weights."""

    async def scenario(engine: Any) -> None:
        await engine.generate(asked("first", 1))
        assert hits(await engine.generate(asked("second", 1))) == 12, "whole blocks of four"
        begun = [asyncio.create_task(engine.generate(asked(f"begun{i}", 30))) for i in range(3)]
        while len([one for one in engine.llm.output_processor.request_states.values() if one.tokens]) < 3:
            await asyncio.sleep(0.002)
        waiting = asyncio.create_task(engine.generate(asked("waiting", 3)))
        await asyncio.sleep(0.01)
        await engine.pause(mode)
        late = asyncio.create_task(engine.generate(asked("late", 3)))
        await asyncio.sleep(0.01)
        assert (await engine.apply_staged(1, flush=mode == "abort"))[0]
        await engine.resume()
        after = await engine.generate(asked("after", 2))
        again = await engine.generate(asked("again", 2))
        for one in await asyncio.gather(*begun):
            logprobs, count, first, last = told(one)
            assert logprobs == {-0.5} and first == 0
            assert (count, last) == (30, 1) if mode != "abort" else (count < 30 and last == 0)
        held = told(await waiting)
        assert held == ((set(), 0, 0, 0) if mode == "abort" else ({-0.5}, 3, 1, 1))
        assert told(await late) == ({-0.5}, 3, 1, 1) and told(after) == ({-0.5}, 2, 1, 1)
        assert hits(again) == 12, "what the new weights computed is found"

    play(scenario, tmp_path)


def test_without_the_salt_old_entries_would_serve_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above can fail."""
    monkeypatch.setenv("FAKE_VLLM", "unsalted")

    async def scenario(engine: Any) -> None:
        await engine.generate(asked("first", 1))
        await update(engine, 1, "in_place")
        assert told(await engine.generate(asked("after", 2)))[0] == {-9.0}

    play(scenario, tmp_path)


def test_a_request_that_was_computed_with_other_weights_than_its_salt_names_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were one not taken back from the queue, its first token would say so."""

    async def scenario(engine: Any) -> None:
        await engine.generate(asked("first", 1))
        begun = [asyncio.create_task(engine.generate(asked(f"begun{i}", 20))) for i in range(3)]
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(engine.generate(asked("waiting", 3)))
        await asyncio.sleep(0.01)
        for state in engine.llm.output_processor.request_states.values():
            state.is_prefilling = False  # none looks as if it had not begun
        await update(engine, 1, "in_place")
        await asyncio.gather(*begun)
        assert told(await waiting) == ({-0.5}, 3, 1, 1)
        assert engine.info()["running"] == 0

    play(scenario, tmp_path)


def test_log_probabilities_are_the_same_with_and_without(tmp_path: Path) -> None:
    found: dict[bool, list[tuple[Any, ...]]] = {}

    async def scenario(engine: Any) -> None:
        answers = [await engine.generate(asked(f"{i}", 4, PROMPT[: 5 + i % 2])) for i in range(6)]
        await update(engine, 1, "in_place")
        answers += [await engine.generate(asked(f"{i}", 4, PROMPT + [i % 3] * 4)) for i in range(6)]
        found[engine.cached] = [told(answer) for answer in answers]
        assert any("cached_tokens" in answer["meta_info"] for answer in answers) is engine.cached

    for cached in (True, False):
        (tmp_path / str(cached)).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ASTRA_STAGE_DIR", str(tmp_path / str(cached) / "stage"))
            play(scenario, tmp_path / str(cached), cached=cached)
    assert found[True] == found[False]


def test_weights_that_are_put_right_find_nothing_of_the_wrong_ones(tmp_path: Path) -> None:
    """The same version applied twice, and requests that wait meanwhile end when the update has failed."""

    async def scenario(engine: Any) -> None:
        await engine.generate(asked("first", 1))
        await update(engine, 1, "in_place")
        assert hits(await engine.generate(asked("second", 1))) == 0
        restage(tmp_path, ["v000000/manifest.full.json", delta(1)])
        await update(engine, 1, "in_place")
        assert hits(await engine.generate(asked("third", 1))) == 0
        restage(tmp_path, [delta(3)])  # of version 2, which the engine does not hold
        await engine.pause("in_place")
        held = asyncio.create_task(engine.generate(asked("held", 1)))
        await asyncio.sleep(0.01)
        assert not (await engine.apply_staged(3, flush=False))[0]
        await engine.resume()
        assert (await held)["meta_info"]["finish_reason"] == {"type": "abort"}
        await engine.pause("abort")
        held = asyncio.create_task(engine.generate(asked("held too", 1)))
        await asyncio.sleep(0.01)
        assert await engine.abort_all() == 1 and not (await held)["output_ids"]

    play(scenario, tmp_path)
