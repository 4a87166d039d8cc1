"""What episodes generate with: continuations, room, calls that are gathered, and the proof of what was drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from training_tools import recipe

from astracli.data.prompts import Problem
from astracli.engines.contract import GenRequest, GenResult
from astracli.envs.attempt import Failure
from astracli.envs.contract import Env, EnvSetup, Episode, Policy, Score, Turn
from astracli.envs.single_turn import SingleTurnEnv
from astracli.rl.schedule import sample_seed
from astracli.rollout.episodes import play
from astracli.rollout.groups import group_of, prompt_length, segments
from astracli.rollout.policy import RolloutSampling

PROMPT = [9, 9, 9]


def result(tokens: Sequence[int], reason: Any, version: int) -> GenResult:
    return GenResult(np.array(tokens, np.int32), -np.array(tokens, np.float32), reason, version, version, rid="")


class Cutting:
    """An engine worker; its engine ends a request after `each` tokens, under a version of its own, and never stops."""

    name = "engine0"

    def __init__(self, each: int = 100, reason: str = "abort"):
        self.each, self.reason = each, reason
        self.calls: list[list[GenRequest]] = []
        self.aborted: list[tuple[int, int]] = []

    async def generate(self, requests: Sequence[GenRequest], heard: Any) -> list[GenResult]:
        self.calls.append(list(requests))
        version = len(self.calls)
        results = [result([2 + version] * min(self.each, r.max_new_tokens), self.reason, version) for r in requests]
        for place, one in enumerate(results if heard else ()):
            await asyncio.sleep(0)
            heard(place, one, place % 2 == 0)  # every other one may not be used before the call returns
        return results

    def count_aborted(self, samples: int, tokens: int) -> None:
        self.aborted.append((samples, tokens))


class Tokenizer:
    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def made(kind: type[Env], chosen: Any, prompt: Sequence[int] = tuple(PROMPT)) -> Env:
    no_grader: Any = None
    return kind(EnvSetup(chosen, Tokenizer(), no_grader, lambda problem: prompt))


def played(
    kind: type[Env], worker: Any, leases: Sequence[int] = (5,), prompt: Sequence[int] = tuple(PROMPT), **tables: Any
) -> tuple[dict[int, list[Any]], list[int]]:
    """(episodes by lease, changes of the slots)"""
    chosen, changes = recipe(**tables), []
    asked = {lease: Problem(f"p{lease}", "?", "!") for lease in leases}
    work = play(made(kind, chosen, prompt), worker, RolloutSampling(chosen, (1,)), asked, changes.append)
    return asyncio.run(work), changes


def test_a_continuation_asks_for_the_rest_with_the_same_draws() -> None:
    worker = Cutting(7)
    found, slots = played(SingleTurnEnv, worker, rollout={"group_size": 2, "max_new_tokens": 16, "context_length": 64})
    assert slots == [-1, -1], "an abort leaves an episode its place until its room is used up"
    assert [[r.max_new_tokens for r in call] for call in worker.calls] == [[16, 16], [9, 9], [2, 2]]
    assert [[r.draw_offset for r in call] for call in worker.calls] == [[0, 0], [7, 7], [14, 14]]
    assert [len(call[0].input_ids) for call in worker.calls] == [3, 10, 17]
    assert {tuple(r.seed for r in call) for call in worker.calls} == {(sample_seed(0, 5, 0), sample_seed(0, 5, 1))}
    assert worker.aborted == [(2, 20), (2, 34)]  # what is prefilled again: prompt and prefix of both
    for episode in found[5]:
        assert episode.finish == "length", "an abort that used up the room is an end"
        parts = [(s.version, len(s.tokens), s.logprobs.tolist()) for s in segments(episode, 3)]
        assert parts == [(1, 7, [-3.0] * 7), (2, 7, [-4.0] * 7), (3, 2, [-5.0] * 2)]


def test_a_long_prompt_leaves_less_room() -> None:
    worker = Cutting()
    table = {"group_size": 2, "max_new_tokens": 16, "context_length": 20}
    found, _ = played(SingleTurnEnv, worker, prompt=[9] * 8, rollout=table)
    assert [[r.max_new_tokens for r in call] for call in worker.calls] == [[12, 12]] and len(found[5][0].tokens) == 20
    env = made(SingleTurnEnv, recipe(rollout=table), [9] * 20)
    assert str(env.unfit(Problem("p", "?", "!"))).endswith("leaves no room in rollout.context_length = 20")


class Uneven(Env):
    """Lease l has l turns; each gets one token more from outside."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        for _ in range(int(problem.id[1:])):
            await asyncio.sleep(0.001 * len(problem.id))
            episode.add(await policy.generate(episode.tokens, stop=[7], budget=2))
            episode.tell([50])
        return episode


@pytest.mark.parametrize("deterministic", [True, False])
def test_turns_of_a_wave_are_one_call_in_a_deterministic_run(deterministic: bool) -> None:
    worker = Cutting(reason="length")
    table = {"group_size": 2, "max_new_tokens": 9, "context_length": 64}
    found, slots = played(Uneven, worker, leases=(3, 1, 2), rollout=table, launch={"deterministic": deterministic})
    seeds = [[r.seed for r in call] for call in worker.calls]
    if deterministic:
        waves = enumerate(([3, 1, 2], [3, 2], [3]))
        expected = [[sample_seed(0, lease, i, turn) for lease in some for i in (0, 1)] for turn, some in waves]
        assert seeds == expected and slots == []
    else:
        assert sorted(seed for call in seeds for seed in call) == sorted(
            sample_seed(0, lease, i, turn) for lease in (3, 1, 2) for i in (0, 1) for turn in range(lease)
        )
        assert sum(slots) == -6, "six episodes ended; a later turn takes its place again"
        assert sum(abs(change) for change in slots) == 2 * 12 - 6
    last = worker.calls[-1][0]
    assert last.stop_token_ids == (1, 7) and last.draw_offset == 0
    for lease, episodes in found.items():
        for episode in episodes:
            assert episode.loss_mask.tolist() == [0] * 3 + [1, 1, 0] * lease
            assert len(episode.versions) == 2 * lease


class Chatter(Env):
    """Asks for more than there is room for."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        for _ in range(3):
            turn = await policy.generate(episode.tokens, budget=6)
            episode.add(turn)
            episode.tell([50, 51])
        return episode


def test_the_room_is_that_of_the_whole_episode() -> None:
    """16 tokens behind the prompt, told ones too: 6 drawn, 2 told, 6 drawn, 2 told; then none is asked for."""
    worker = Cutting(reason="length")
    found, _ = played(Chatter, worker, rollout={"group_size": 2, "max_new_tokens": 16, "context_length": 64})
    assert {r.max_new_tokens for call in worker.calls for r in call} == {6} and sum(map(len, worker.calls)) == 4
    episode = found[5][0]
    assert episode.loss_mask.sum() == 12 and episode.finish == "length"
    assert episode.answer.tolist() == [4] * 6


def test_an_episode_trains_what_was_drawn_and_nothing_else() -> None:
    """`change` spoils what an Env returns; the words say how."""

    def failed(change: Any) -> str:
        class Spoiled(Env):
            async def run(self, problem: Problem, policy: Policy) -> Episode:
                episode = self.begin(problem)
                episode.add(await policy.generate(episode.tokens, budget=3))
                episode.tell([50])
                episode.add(await policy.generate(episode.tokens, budget=3))
                return change(episode) or episode

        found, _ = played(Spoiled, Cutting(reason="stop"), rollout={"group_size": 2, "max_new_tokens": 16})
        one = found[5][0]
        return one.words if isinstance(one, Failure) else ""

    def set_to(name: str, place: Any, value: Any) -> Any:
        return lambda episode: getattr(episode, name).__setitem__(place, value)

    assert failed(lambda episode: None) == ""
    not_drawn = "no turn of its policy drew them after the tokens before"
    assert not_drawn in failed(set_to("tokens", 3, 60)), "another token"
    assert not_drawn in failed(set_to("logprobs", 0, -0.5)), "another log-probability"
    assert not_drawn in failed(set_to("versions", 4, 9))
    assert not_drawn in failed(set_to("tokens", 1, 60)), "another prompt than it was drawn after"
    assert not_drawn in failed(set_to("tokens", 6, 60)), "another tool result"
    drawn = Turn(np.array([60], np.int32), np.zeros(1, np.float32), np.ones(1, np.int32), "stop")
    assert not_drawn in failed(lambda episode: episode.add(drawn))
    assert "of 10 tokens has 10 in its loss_mask, of which 5 are drawn, with 6" in failed(set_to("loss_mask", 3, False))
    assert "its first token cannot be drawn" in failed(
        lambda e: Episode(e.tokens, np.arange(10) < 6, e.logprobs, e.versions)
    )
    assert "finish is `stop` or `length`, not 'tool'" in failed(lambda episode: setattr(episode, "finish", "tool"))
    assert "returned a list, not an Episode" in failed(lambda episode: [1])

    def without_the_first(e: Episode) -> Episode:
        mask = e.loss_mask.copy()
        mask[3:6] = False
        return Episode(e.tokens, mask, e.logprobs[3:], e.versions[3:])

    def cut(e: Episode) -> Episode:
        return Episode(e.tokens[:-1], e.loss_mask[:-1], e.logprobs[:-1], e.versions[:-1])

    assert failed(without_the_first) == failed(cut) == "", "a turn may be masked, or cut at its end"


def test_the_prompt_of_a_group_is_what_all_begin_with() -> None:
    def episode(*tokens: int, drawn: Sequence[int]) -> Episode:
        mask = np.isin(np.arange(len(tokens)), drawn)
        return Episode(np.array(tokens), mask, np.zeros(len(drawn)), np.full(len(drawn), 3), text="")

    some = [
        episode(2, 3, 4, 20, drawn=[3]),
        episode(2, 3, 5, 6, 20, 7, drawn=[4]),
        episode(2, 3, 4, 20, 21, drawn=[3, 4]),
    ]
    assert prompt_length(some) == 2 and prompt_length(some[::2]) == 3
    assert prompt_length([episode(2, 3, drawn=[]), episode(2, 3, 9, drawn=[2])]) == 2
    chosen = recipe()
    scores = [Score(1.0, "right")] * 3
    group = group_of(
        made(SingleTurnEnv, chosen), 8, Problem("p", "?", "!"), dict(zip((0, 1, 3), some, strict=True)), scores
    )
    assert group.prompt_tokens.tolist() == [2, 3] and [s.index for s in group.samples] == [0, 1, 3]
    assert [s.tokens.tolist() for s in group.samples] == [[4, 20], [5, 6, 20, 7], [4, 20, 21]]
    assert [s.loss_mask.tolist() for s in group.samples] == [[0, 1], [0, 0, 1, 0], [0, 1, 1]]
    assert [[s.version for s in sample.segments] for sample in group.samples] == [[None, 3], [None, 3, None], [None, 3]]
