"""Episodes of an Env on one engine: run at once, each ended by its own errors alone; and what those errors lead to."""

from __future__ import annotations

import asyncio
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from astracli.data.prompts import Problem
from astracli.envs import time_limit
from astracli.envs.contract import Env, Episode, Score
from astracli.errors import AstraError, RunFailed
from astracli.rollout.policy import EngineCalls, EpisodePolicy, RolloutSampling
from astracli.rollout.request_gate import EngineLost, RequestGate

_NOT_THEIRS = (os.path.dirname(asyncio.__file__), __file__, time_limit.__file__)
FAILED_IN_A_ROW = 64
"""Episodes in a row that end in an error, after which the run ends in that error's words."""


@dataclass(frozen=True)
class Failure:
    """An episode that its environment has failed."""

    error: BaseException

    @property
    def words(self) -> str:
        """The error, and where it came from."""
        kind, file, line = self.place
        return f"{kind}: {self.error}" + (f" ({file}, line {line})" if file else "")

    @property
    def text(self) -> str:
        return "".join(traceback.format_exception(self.error)).rstrip()

    @property
    def place(self) -> tuple[str, str, int]:
        """(kind of error, file, line) of where it came from: failures that share it are shown once.

        The innermost line that is neither Python's own nor of what runs episodes: of one that hung, where it waited.
        """
        chain = [error for error in (self.error, self.error.__cause__) if error is not None]
        frames = [frame for error in chain for frame in traceback.extract_tb(error.__traceback__)]
        theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
        last = (theirs or frames)[-1:]
        file, line = (last[0].filename, last[0].lineno or 0) if last else ("", 0)
        return type(self.error).__name__, file, line


@dataclass
class Failures:
    """Counts failed episodes, shows each traceback once, and ends a run in which every episode fails."""

    name: str
    """As `rollout.env` says it."""
    show: Callable[[str], None]
    """Gets each kind of failure once, with its traceback."""
    count: int = 0
    in_a_row: int = 0
    last: str = ""
    """The last failure in words."""
    _shown: set[tuple[str, str, int]] = field(default_factory=set)

    def note(self, results: Sequence[Episode | Failure]) -> int:
        """-> how many of them failed. Raises RunFailed after FAILED_IN_A_ROW."""
        failed = [one for one in results if isinstance(one, Failure)]
        self.count += len(failed)
        self.in_a_row = self.in_a_row + len(failed) if len(failed) == len(results) else 0
        for failure in failed:
            self.last = failure.words
            if failure.place not in self._shown:
                self._shown.add(failure.place)
                words = "an episode failed; it is left out of its group, and others like it are counted in silence"
                self.show(f"rollout.env = {self.name}: {words}\n{failure.text}")
        if self.in_a_row >= FAILED_IN_A_ROW:
            raise RunFailed(
                f"{self.in_a_row} episodes in a row failed in rollout.env = `{self.name}`, the last with {self.last}",
                "the log of the rollout worker has the traceback",
            )
        return len(failed)


async def play(
    env: Env,
    worker: RequestGate,
    sampling: RolloutSampling,
    asked: Mapping[int, Problem],
    slots: Callable[[int], None],
) -> dict[int, list[Episode | Failure]]:
    """All episodes of some groups. `asked`: lease id -> problem. -> lease id -> its episodes.

    `slots` is told of each place on the engine that becomes free (-1) or is taken again (1); at first every episode has
    one. In a deterministic run, which frees all at its end, it is not. Raises EngineLost, RunFailed.
    """
    whole, size = sampling.recipe.launch.deterministic, sampling.recipe.rollout.group_size
    try:
        async with asyncio.TaskGroup() as tasks:
            calls = EngineCalls(worker, sampling, tasks, whole=whole, slots=slots)
            limit_s = sampling.recipe.rollout.env_timeout_s
            running = {
                (lease, index): tasks.create_task(
                    _episode(env, problem, EpisodePolicy(calls, lease, index, number * size + index), limit_s)
                )
                for number, (lease, problem) in enumerate(asked.items())
                for index in range(size)
            }
    except ExceptionGroup as group:
        failures = leaves(group)
        raise next((one for one in failures if not isinstance(one, EngineLost)), failures[0]) from None
    return {lease: [running[lease, index].result() for index in range(size)] for lease in asked}


async def _episode(env: Env, problem: Problem, policy: EpisodePolicy, limit_s: float) -> Episode | Failure:
    try:
        async with time_limit.limited(limit_s):
            episode = await env.run(problem, policy)
        if not isinstance(episode, Episode):
            raise TypeError(f"`run` of {type(env).__name__} returned a {type(episode).__name__}, not an Episode")
        policy.check(episode)
        episode.parts = {str(name): float(value) for name, value in episode.parts.items()}
        return episode
    except Exception as error:
        return Failure(error)
    finally:
        policy.end()


async def score(env: Env, problem: Problem, episodes: Sequence[Episode], limit_s: float) -> list[Score] | Failure:
    """The scores of a problem's episodes; a failure is one of all of them. What ends the run
    (a grader that cannot start) is raised."""
    try:
        async with time_limit.limited(limit_s):
            found = list(await env.score(episodes, problem))
        if len(found) != len(episodes):
            raise ValueError(
                f"`score` of {type(env).__name__} returned {len(found)} scores for {len(episodes)} episodes"
            )
        return [_score(one) for one in found]
    except AstraError:
        raise
    except Exception as error:
        return Failure(error)


def _score(given: Score | float) -> Score:
    """A bare number is right when it is above 0. Raises ValueError for one that is none."""
    score = given if isinstance(given, Score) else Score(float(given), "right" if given > 0 else "wrong")
    if not math.isfinite(score.reward):
        raise ValueError(f"a score is {score.reward}")
    return score


def leaves(error: Exception) -> list[Exception]:
    """The failures inside nested groups, in order."""
    if isinstance(error, ExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]
