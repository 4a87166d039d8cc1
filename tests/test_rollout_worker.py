"""The rollout worker against a real hub and a small engine on real sockets: leases, prompts, groups, its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import warm
from fake_engine import FakeEngine
from hub_tools import in_file
from rollout_world import LENGTH, TOKEN, World, expected, recipe, records, until, world

from astracli.data.prompts import PromptSource
from astracli.errors import RunFailed
from astracli.process.config import SampleFile
from astracli.rl.types import Group, unpack_group
from astracli.rollout.episodes import leaves
from astracli.rollout.request_gate import FAILURES_IN_A_ROW, LOST_CALLS

__all__ = ["world"]


def test_groups_come_in_graded_and_whole(world: World) -> None:
    got: list[Group] = []

    async def scenario() -> None:
        got.extend(await world.batch(0))

    asyncio.run(world.play(scenario))
    assert [group.lease_id for group in got] == [0, 1, 2, 3]
    source = PromptSource(recipe().data, 5)
    for group in got:
        problem = source.problem(group.lease_id)
        assert (group.problem_id, group.answer) == (problem.id, problem.answer)
        assert group.prompt_tokens.tolist() == [ord(c) for c in problem.question]
        assert [sample.reward for sample in group.samples] == [1.0, 0.0, 1.0, 0.0]
        for sample in group.samples:
            assert sample.tokens.tolist() == expected(group.lease_id, sample.index)
            assert (sample.finish_reason, len(sample.segments)) == ("stop", 1)
            assert sample.text == "".join(chr(t) for t in sample.tokens[:-1])
    assert world.store.counts().in_flight == 0, "what was not finished went back"


def test_what_a_broken_connection_loses_is_drawn_again(world: World) -> None:
    """The engine is there all the while: nothing is attached anew, and the samples are those of an unbroken run."""
    world.engine.cuts = 4

    async def scenario() -> None:
        world.store.announce(0, 0)
        groups = await world.batch(0)
        for group in groups:
            for index, sample in enumerate(group.samples):
                assert sample.tokens.tolist() == expected(group.lease_id, index)
        world.store.announce(1, 1)
        await until(lambda: bool(records(world)))

    asyncio.run(world.play(scenario))
    assert world.engine.cuts == 0 and world.fetcher.asked == [(1, 0)]
    assert 1 <= records(world)[0]["redrawn_requests"] <= 4 * 8


def test_connections_that_always_break_end_the_run(world: World) -> None:
    world.engine.cuts = sys.maxsize
    with pytest.raises(ExceptionGroup) as failure:
        asyncio.run(world.play())
    (error,) = leaves(failure.value)
    assert isinstance(error, RunFailed) and "is gone" in error.message
    assert world.engine.generated >= FAILURES_IN_A_ROW * (LOST_CALLS + 1)


def test_two_engines_share_the_work_and_both_follow(world: World) -> None:
    world.others.append(FakeEngine(TOKEN, length=LENGTH).start())
    got: list[Group] = []

    async def scenario() -> None:
        for step in range(3):
            got.extend(await world.batch(step))
            world.store.announce(step + 1, step + 1)
        await until(lambda: world.engine.version == world.others[0].version == 3)

    asyncio.run(world.play(scenario))
    assert len({group.lease_id for group in got}) == 12
    assert all(sample.tokens.tolist() == expected(g.lease_id, sample.index) for g in got for sample in g.samples)
    assert all(group.oldest_version >= step - 1 for step, group in zip([0] * 4 + [1] * 4 + [2] * 4, got, strict=True))


def test_prompts_that_do_not_fit_are_skipped_and_counted(world: World) -> None:
    async def scenario() -> None:
        await until(lambda: world.store.counts().skipped > 20)

    asyncio.run(world.play(scenario, data={"max_prompt_tokens": 4}))
    assert world.store.state().skipped_in_a_row > 20
    (row,) = in_file(world.path, "SELECT reason FROM groups WHERE state = 'skipped' LIMIT 1")
    assert row[0].endswith("tokens, data.max_prompt_tokens = 4")


def test_a_run_whose_prompts_all_do_not_fit_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astracli.rollout.worker.UNFIT_PROMPTS", 30)

    async def scenario() -> None:
        await until(lambda: world.store.counts().skipped > 10_000)

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(world.play(scenario, data={"max_prompt_tokens": 4}))
    (failure,) = error.value.exceptions
    assert isinstance(failure, RunFailed) and "none of 30 prompts fits, the last: prompt of" in failure.message
    assert "raise data.max_prompt_tokens" in str(failure.hint)


def test_n_groups_are_written_without_a_trainer(world: World) -> None:
    out = world.path / "samples.jsonl"
    world.engine.cached_share = 0.5
    asyncio.run(world.play(samples=SampleFile(path=out, groups=5)))
    (record,) = records(world)
    assert 0.4 < record["prefix_hit_rate"] <= 0.5, "half of each prompt, in whole tokens"
    assert (record["process"], record["engine"]) == ("rollout", "engine0") and "step" not in record
    assert 0 < record["slots_busy"] <= 1 and 0 < record["interval_s"] < 60
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 * 4
    assert {row["problem_id"] for row in rows} == {PromptSource(recipe().data, 5).problem(i).id for i in range(5)}
    row = rows[0]
    assert list(row) == [
        "step", "version", "problem_id", "problem", "answer", "sample", "completion", "tokens", "logprobs", "advantage",
        "reward", "verdict", "finish_reason",
    ]  # fmt: skip
    assert (row["step"], row["version"], row["advantage"], len(row["tokens"])) == (None, 0, None, LENGTH)


def save_tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(32 + i): 3 + i for i in range(95)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(str(path))


def test_a_killed_worker_process_loses_no_group(tmp_path: Path) -> None:
    """The real process, killed with SIGKILL in the middle of its groups and started again."""
    world = World(tmp_path, {"drop_equal_groups": False}, step_s=0.02)
    save_tokenizer(tmp_path)
    config = world.config(data={"reward": "probe"})
    file = tmp_path / "rollout.json"
    file.write_text(config.model_dump_json())
    argv, said = ["-m", "astracli.rollout.worker", str(file)], (tmp_path / "out", tmp_path / "err")
    child = warm.start(argv, tmp_path / "first")
    try:
        end = time.monotonic() + 60
        while world.engine.running < 8 and time.monotonic() < end:
            time.sleep(0.01)
        assert world.engine.running == 8
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert world.store.counts().in_flight > 0
        child = warm.start(argv, *said)
        served = []
        for step in range(2):
            while (reply := world.store.batch(step)).batch is None and time.monotonic() < end:
                time.sleep(0.02)
            served += [unpack_group(blob).lease_id for blob in reply.batch.groups]
            world.store.engine_state("engine0", step + 1, "ready")
        assert sorted(served) == list(range(8))
        world.store.request_stop()
        assert child.wait(60) == 0 and [file.read_text() for file in said] == ["", ""]
    finally:
        warm.end(child)
        world.close()
