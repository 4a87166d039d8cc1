"""A benchmark whose samples are episodes of an Env: several turns, tools, a score of the environment's own.

An episode is asked of one engine from its beginning to its end. One that an engine aborts, or that was on an engine
that is lost, begins anew: its draws depend on (seed, benchmark, item, sample, turn) alone. Each is scored by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from astracli.engines.contract import GenRequest, GenResult
from astracli.envs import time_limit
from astracli.envs.attempt import Failure, attempt, score
from astracli.envs.contract import Env, Episode, TokenIds, Turn
from astracli.evaluation.benchmark import (
    BenchmarkWork,
    EvalSample,
    Unit,
    check_version,
    sample_seed,
)
from astracli.rewards.reward import Grade

if TYPE_CHECKING:
    from astracli.data.prompts import Problem
    from astracli.engines.client import EngineClient

NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))


class Aborted(Exception):
    """The engine ended a request early."""


@dataclass(frozen=True)
class Played:
    """An episode with its score; or why there is none."""

    episode: Episode | None
    grade: Grade
    version: int


class Wave:
    """The requests of episodes that go on together. What they ask for in one go of the event loop is one call to the
    engine; in a `whole` wave a call waits until each of them has asked or ended, and holds the requests in their order.
    """

    def __init__(self, engine: EngineClient, episodes: int, *, whole: bool):
        self._engine, self._busy, self._whole = engine, episodes, whole
        self._pending: list[tuple[int, GenRequest, asyncio.Future[GenResult]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def ask(self, order: int, request: GenRequest) -> GenResult:
        """Raises what the engine's client raises: RunFailed when it does not answer."""
        done: asyncio.Future[GenResult] = asyncio.get_running_loop().create_future()
        self._pending.append((order, request, done))
        self._busy -= 1
        self._due()
        return await done

    def leave(self) -> None:
        """An episode has ended."""
        self._busy -= 1
        self._due()

    def _due(self) -> None:
        if self._pending and not self._scheduled and not (self._whole and self._busy):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        asks = sorted((ask for ask in self._pending if not ask[2].done()), key=lambda ask: ask[0])
        self._pending = []
        if asks:
            task = asyncio.create_task(self._call(asks))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _call(self, asks: Sequence[tuple[int, GenRequest, asyncio.Future[GenResult]]]) -> None:
        try:
            results = await self._engine.generate([request for _, request, _ in asks])
        except Exception as error:  # each of them says so
            for _, _, done in asks:
                if not done.done():
                    self._busy += 1
                    done.set_exception(error)
            return
        for (_, _, done), result in zip(asks, results, strict=True):
            if not done.done():
                self._busy += 1
                done.set_result(result)


class EvalPolicy:
    """The policy of one episode (`envs.contract.Policy`)."""

    def __init__(self, wave: Wave, order: int, work: EpisodeWork, seed_of: Callable[[int], int]):
        self.failure: Exception | None = None
        """What ended the episode and was not the Env's doing."""
        self._wave, self._order, self._seed_of = wave, order, seed_of
        self._env, self._sampling, self._version = work.env, work.sampling, work.version
        self._prompt: int | None = None
        self._turns = 0

    async def generate(self, tokens: TokenIds, stop: Sequence[int] = (), budget: int | None = None) -> Turn:
        """See `envs.contract.Policy`."""
        context, sampling = [int(token) for token in tokens], self._sampling
        if not context:
            raise ValueError("generate takes the tokens of the episode so far")
        self._prompt = len(context) if self._prompt is None else self._prompt
        room = self._env.recipe.rollout.completion_room(self._prompt) - (len(context) - self._prompt)
        room = room if budget is None else min(room, budget)
        if room < 1:
            return Turn(*NOTHING, "length")
        request = GenRequest(
            input_ids=context,
            max_new_tokens=room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=[*sampling.stop_token_ids, *stop],
            seed=self._seed_of(self._turns),
            stop=sampling.stop,
        )
        self._turns += 1
        try:
            with time_limit.paused():
                result = await self._wave.ask(self._order, request)
            if result.finish_reason == "abort":
                raise Aborted
            check_version(result, self._version)
        except Exception as error:
            self.failure = error
            raise
        versions = np.full(len(result.tokens), result.version, np.int32)
        return Turn(result.tokens, result.logprobs, versions, "stop" if result.finish_reason == "stop" else "length")


class EpisodeWork(BenchmarkWork):
    """The samples of one benchmark at one version, as episodes of an Env."""

    episodes = True

    def __init__(self, *args: Any, env: Env, on_failure: Callable[[Failure], None] = lambda failure: None, **rest: Any):
        """`env`: its recipe says how long an episode may be. `on_failure` gets episodes that the Env has failed."""
        self.env, self._on_failure = env, on_failure
        super().__init__(*args, **rest)

    def _prepare(self) -> None:
        items = self.benchmark.items
        self._asked = [replace(problem, messages=self.benchmark.messages(problem)) for problem in items]
        self._fits = [self.env.unfit(problem) is None for problem in self._asked]

    def _room(self, unit: Unit) -> int:
        return int(self._fits[unit[0]])

    async def ask(self, units: Sequence[Unit], engine: EngineClient) -> list[tuple[Unit, Any]]:
        asked = [unit for unit in units if self._room(unit) > 0]
        wave = Wave(engine, len(asked), whole=self._whole)
        found = await asyncio.gather(
            *(self._play(wave, order, unit) for order, unit in enumerate(asked)), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return list(zip(asked, found, strict=True))

    async def _play(self, wave: Wave, order: int, unit: Unit) -> Played | None:
        """None: it has to begin anew. Raises RunFailed."""
        problem = self._asked[unit[0]]
        seed_of = partial(sample_seed, self.sampling.seed, self.benchmark.name, problem.id, unit[1])
        policy = EvalPolicy(wave, order, self, seed_of)
        limit_s = self.env.recipe.rollout.env_timeout_s
        try:
            episode = await attempt(self.env, problem, policy, limit_s, whole)
        finally:
            wave.leave()
        if isinstance(policy.failure, Aborted):
            return None
        if policy.failure is not None:
            raise policy.failure
        scores = [] if isinstance(episode, Failure) else await score(self.env, problem, [episode], limit_s)
        for failure in (episode, scores):
            if isinstance(failure, Failure):
                self._on_failure(failure)
                return Played(None, Grade(0.0, "error", failure.words), self.version or 0)
        assert isinstance(episode, Episode) and isinstance(scores, list)
        version = int(episode.versions[0]) if len(episode.versions) else self.version or 0
        return Played(episode, replace(scores[0], parts={**episode.parts, **scores[0].parts}), version)

    async def _graded(self, answers: Sequence[tuple[Unit, Any]]) -> list[EvalSample]:
        return [self._sample(self.benchmark.items[place], sample, one) for (place, sample), one in answers]

    def _sample(self, problem: Problem, sample: int, played: Played) -> EvalSample:
        episode = played.episode
        if episode is None:
            return EvalSample(problem, sample, played.version, "", *NOTHING[:2], "error", played.grade)
        prompt = episode.spans[0][0] if episode.spans else len(episode.tokens)
        behind = episode.tokens[prompt:]
        return EvalSample(
            problem,
            sample,
            played.version,
            self.env.text(behind),
            behind,
            episode.logprobs,
            episode.finish,
            played.grade,
            loss_mask=episode.loss_mask[prompt:],
        )


def whole(episode: Episode) -> None:
    """Raises ValueError when mask and log-probabilities do not belong together."""
    episode.changed()
    drawn = int(np.count_nonzero(episode.loss_mask))
    if len(episode.tokens) != len(episode.loss_mask) or not drawn == len(episode.logprobs) == len(episode.versions):
        raise ValueError(
            f"an episode of {len(episode.tokens)} tokens marks {drawn} as drawn, with {len(episode.logprobs)} "
            f"log-probabilities and {len(episode.versions)} versions"
        )
