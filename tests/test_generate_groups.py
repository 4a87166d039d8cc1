"""A group's requests: what is asked again after an end that was none, and when a completion has used its room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from training_tools import recipe

from astracli.engines.contract import GenRequest, GenResult
from astracli.rl.schedule import sample_seed
from astracli.rollout.groups import Draft, RolloutSampling, generate_groups

PROMPT = [9, 9, 9]


def result(tokens: Sequence[int], reason: Any, version: int) -> GenResult:
    return GenResult(np.array(tokens, np.int32), -np.array(tokens, np.float32), reason, version, version, rid="")


class Cutting:
    """An engine worker; its engine ends a request after `each` tokens, under a version of its own, and never stops."""

    name = "engine0"

    def __init__(self, each: int):
        self.each = each
        self.calls: list[list[GenRequest]] = []
        self.aborted: list[tuple[int, int]] = []

    async def generate(self, requests: Sequence[GenRequest], ended: Any) -> list[GenResult]:
        self.calls.append(list(requests))
        version = len(self.calls)
        results = [result([2 + version] * min(self.each, r.max_new_tokens), "abort", version) for r in requests]
        for place, one in enumerate(results):
            ended(place, one)
        return results

    def count_aborted(self, samples: int, tokens: int) -> None:
        self.aborted.append((samples, tokens))


def test_a_continuation_asks_for_the_rest_with_the_same_draws() -> None:
    chosen = recipe(rollout={"group_size": 2, "max_new_tokens": 16, "context_length": 64})
    worker: Any = Cutting(7)
    ended: list[int] = []
    work = generate_groups(worker, RolloutSampling(chosen, (1,)), {5: PROMPT}, lambda: ended.append(len(worker.calls)))
    drafts = asyncio.run(work)[5]
    assert ended == [3, 3], "an abort leaves a sample outstanding until its room is used up"
    assert [[r.max_new_tokens for r in call] for call in worker.calls] == [[16, 16], [9, 9], [2, 2]]
    assert [[r.draw_offset for r in call] for call in worker.calls] == [[0, 0], [7, 7], [14, 14]]
    assert [len(call[0].input_ids) for call in worker.calls] == [3, 10, 17]
    assert {tuple(r.seed for r in call) for call in worker.calls} == {(sample_seed(0, 5, 0), sample_seed(0, 5, 1))}
    assert worker.aborted == [(2, 20), (2, 34)]  # what is prefilled again: prompt and prefix of both samples
    for draft in drafts:
        assert draft.finish == "length", "an abort that used up the room is an end"
        assert [(s.version, len(s.tokens)) for s in draft.segments] == [(1, 7), (2, 7), (3, 2)]


def test_a_long_prompt_leaves_less_room() -> None:
    chosen = recipe(rollout={"group_size": 2, "max_new_tokens": 16, "context_length": 20})
    worker: Any = Cutting(100)
    (first, _) = asyncio.run(generate_groups(worker, RolloutSampling(chosen, (1,)), {0: [9] * 8}, lambda: None))[0]
    assert [[r.max_new_tokens for r in call] for call in worker.calls] == [[12, 12]] and len(first.tokens) == 12
    assert RolloutSampling(chosen, ()).budget([9] * 20) == 0


def test_segments_of_one_version_are_joined() -> None:
    draft = Draft(0)
    for tokens, reason, version in (([3], "abort", 4), ([], "abort", 5), ([4, 5], "abort", 4), ([6], "stop", 6)):
        draft.take(result(tokens, reason, version))
    assert [(s.version, s.tokens.tolist(), s.logprobs.tolist()) for s in draft.segments] == [
        (4, [3, 4, 5], [-3.0, -4.0, -5.0]),
        (6, [6], [-6.0]),
    ]
    assert draft.finish == "stop" and draft.tokens == [3, 4, 5, 6]
