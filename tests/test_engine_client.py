"""The client before an engine that runs foreign code and answers success whatever our loader found in it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from astracli.engines.contract import UpdateReply
from astracli.engines.sglang.client import SglangClient

TOKEN = "secret"


def update(tmp_path: Path, result: dict[str, Any] | None) -> tuple[UpdateReply, FakeEngine]:
    engine = FakeEngine(TOKEN, stage_dir=tmp_path, results=[result]).start()
    (tmp_path / "result.json").write_text('{"ok": true, "version": 3, "message": ""}')  # of an update before

    async def go() -> UpdateReply:
        async with SglangClient(engine.url, TOKEN, stage_dir=tmp_path) as client:
            await client.pause()
            return await client.apply_staged(3)

    try:
        return asyncio.run(go()), engine
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "the weight loader left no result"),
        ({"version": 2}, "the loader applied version 2"),
        ({"ok": False, "version": None, "message": "3 tensors have the wrong digest"}, "3 tensors have the wrong"),
    ],
)
def test_success_without_the_loaders_word_is_none_and_the_weights_stay_unproven(
    tmp_path: Path, result: dict[str, Any] | None, words: str
) -> None:
    found, engine = update(tmp_path, result)
    assert not found.success and words in found.message
    assert engine.version == -1 and not any(event.startswith("called") for event in engine.events)


def test_the_loaders_word_is_the_outcome_and_gives_the_weights_their_name(tmp_path: Path) -> None:
    found, engine = update(tmp_path, {"version": 3, "changed": 9, "apply_s": 0.5, "load_s": None, "readback": True})
    assert found.success and found.outcome["changed"] == 9 and found.outcome["readback"]
    assert found.seconds == {"apply_s": 0.5}
    assert engine.version == 3 and engine.events[-1] == "called 3"
