"""Evaluations of environments: episodes of several turns, counted like single completions, and their own figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_cases import SAMPLING, CharTokenizer, FakeEngine, InstantGrader, small
from rollout_world import recipe

from astracli.data.prompts import Problem
from astracli.engines.contract import GenRequest, GenResult
from astracli.envs.attempt import Failure
from astracli.envs.contract import Env, EnvSetup, Episode, Policy, Score
from astracli.envs.prompt_tokens import PromptTokens
from astracli.errors import RunFailed
from astracli.evaluation import files
from astracli.evaluation.benchmark import Result, sample_seed
from astracli.evaluation.episodes import EpisodeWork
from astracli.evaluation.spread import evaluate
from astracli.models.chat import ChatFormat

TOLD = [7, 8]


class Digits(FakeEngine):
    """Three digits that follow from the seed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.abort_turn = -1
        self.__dict__.update(changes)

    async def generate(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        self.calls.append(list(requests))
        await asyncio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise RunFailed("engine at nowhere is gone")
        results = []
        for request in requests:
            tokens = np.array([*drawn(request.seed), 1], np.int32)[: request.max_new_tokens]
            reason: Any = "stop" if tokens[-1] == 1 else "length"
            if self.abort_turn == list(request.input_ids).count(TOLD[0]) and self.aborts:
                self.aborts -= 1
                tokens, reason = tokens[:1], "abort"
            logprobs = -np.arange(len(tokens), dtype=np.float32)
            results.append(GenResult(tokens, logprobs, reason, self.version, self.started, ""))
        return results


def drawn(seed: int) -> list[int]:
    return [2 + (seed >> shift) % 5 for shift in (3, 6, 9)]


class TwoTurns(Env):
    """A turn, two tokens from outside, a turn. An odd first digit is right; one of item 2's episodes raises."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        episode.add(await policy.generate(episode.tokens))
        if problem.id == small(3).items[2].id and episode.answer[0] == 2:
            raise LookupError("no such board")
        episode.tell(TOLD)
        episode.add(await policy.generate(episode.tokens, budget=2))
        episode.parts = {"turns": 2.0, "tool_errors": float(episode.answer[0] == 3)}
        return episode

    async def score(self, group: Sequence[Episode], problem: Problem) -> list[Score | float]:
        assert len(group) == 1, "each is scored by itself"
        return [float(group[0].tokens[group[0].spans[0][0]] % 2)]


def played(engine: Digits, items: int = 3, **options: Any) -> tuple[Result, list[Failure]]:
    chosen, coder, failures = recipe(), CharTokenizer(), list[Failure]()
    env = TwoTurns(EnvSetup(chosen, coder, lambda problem: InstantGrader(), PromptTokens(coder, ChatFormat())))
    options = {"sampling": SAMPLING, "version": 7, "max_concurrency": 64} | options
    grader: Any = InstantGrader()
    work = EpisodeWork(small(items), coder, grader, env=env, on_failure=failures.append, **options)
    engines: Any = {"engine0": engine}
    fixed, most = options.get("whole_calls", False), options["max_concurrency"]
    return asyncio.run(evaluate([work], engines, max_concurrency=most, fixed=fixed))[0], failures


def seeds(items: int, turn: int = 0, n: int = 8) -> list[int]:
    return [sample_seed(5, "arithmetic-heldout", p.id, i, turn) for p in small(items).items for i in range(n)]


def test_episodes_are_counted_and_their_figures_have_means() -> None:
    result, failures = played(Digits())
    first, second = ([drawn(seed)[0] for seed in seeds(3, turn)] for turn in (0, 1))
    failed = [place >= 16 and digit == 2 for place, digit in enumerate(first)]
    right = [digit % 2 == 1 and not bad for digit, bad in zip(first, failed, strict=True)]
    assert any(failed) and 0 < sum(right) < 24
    assert [sample.grade.verdict == "right" for sample in result.samples] == right
    assert result.score.avg_at_n == pytest.approx(np.mean(right))
    figures = result.figures()
    whole = [digit for digit, bad in zip(second, failed, strict=True) if not bad]
    assert figures["turns_mean"] == 2.0
    assert figures["tool_errors_mean"] == pytest.approx(np.mean([digit == 3 for digit in whole]))
    assert figures["errors"] == sum(failed) == len(failures) and figures["tokens"] == 6 * len(whole)
    assert {failure.place for failure in failures} == {failures[0].place} and "no such board" in failures[0].text
    sample = result.samples[0]
    assert sample.tokens.tolist() == [*drawn(seeds(1)[0]), 1, *TOLD, *drawn(seeds(1, 1)[0])[:2]]
    assert sample.loss_mask is not None and sample.loss_mask.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert sample.logprobs.tolist() == [0, -1, -2, -3, 0, -1] and sample.finish_reason == "length"


def test_an_episode_that_is_aborted_or_loses_its_engine_begins_anew_and_ends_alike() -> None:
    wanted, _ = played(Digits())
    for engine in (Digits(aborts=5, abort_turn=1), Digits(aborts=2, abort_turn=0), Digits(failures=2)):
        found, _ = played(engine)
        for one, other in zip(found.samples, wanted.samples, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and one.grade.parts == other.grade.parts
        assert engine.aborts == engine.failures == 0


def test_another_version_in_the_middle_of_an_episode_is_an_error() -> None:
    with pytest.raises(RunFailed, match="pinned to version 7 was answered by version 8"):
        played(Digits(version=8))


def test_a_fixed_call_waits_for_all_of_its_episodes() -> None:
    engine = Digits()
    played(engine, 2, whole_calls=True, max_concurrency=6)
    asked = [[request.seed for request in call] for call in engine.calls]
    cut = [(i, min(i + 6, 16)) for i in range(0, 16, 6)]
    assert asked == [seeds(2, turn)[a:b] for a, b in cut for turn in (0, 1)]


def test_what_an_earlier_attempt_left_keeps_its_mask(tmp_path: Path) -> None:
    result, _ = played(Digits())
    kept = files.Partial(tmp_path, small(3), 7)
    kept.add(result.samples[:20])
    read = kept.read()
    for one, other in zip(read, result.samples[:20], strict=True):
        assert one.logprobs.tolist() == other.logprobs.tolist() and one.grade.parts == other.grade.parts
        assert (one.loss_mask is None) == (other.loss_mask is None or len(other.loss_mask) == 0)
    line = json.loads(kept.path.read_text().splitlines()[0])
    assert line["loss_mask"] == [1] * 4 + [0] * 2 + [1] * 2 and line["logprobs"][4:6] == [None, None]
    engine = Digits()
    again, _ = played(engine, done_before=read)
    assert len({request.seed for call in engine.calls for request in call}) <= 2 * 4, "the missing ones alone"
    assert [s.tokens.tolist() for s in again.samples] == [s.tokens.tolist() for s in result.samples]
