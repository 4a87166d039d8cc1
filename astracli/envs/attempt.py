"""One episode of an Env, and its score: what the Env's code raises ends this episode and no other."""

from __future__ import annotations

import asyncio
import math
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from astracli.envs import time_limit
from astracli.envs.contract import Env, Episode, Policy, Score
from astracli.errors import AstraError, UserError

if TYPE_CHECKING:
    from astracli.data.prompts import Problem

_NOT_THEIRS = (os.path.dirname(asyncio.__file__), __file__, time_limit.__file__)


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


async def attempt(
    env: Env, problem: Problem, policy: Policy, limit_s: float, check: Callable[[Episode], None]
) -> Episode | Failure:
    """An episode from its prompt to its end. `limit_s`: of the Env's own code, between two calls of the policy.

    `check` raises when the episode is none that can be trained. Raises UserError: what no episode can work with.
    """
    try:
        async with time_limit.limited(limit_s):
            episode = await env.run(problem, policy)
        if not isinstance(episode, Episode):
            raise TypeError(f"`run` of {type(env).__name__} returned a {type(episode).__name__}, not an Episode")
        check(episode)
        episode.parts = {str(name): float(value) for name, value in episode.parts.items()}
        return episode
    except UserError:
        raise
    except Exception as error:
        return Failure(error)


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
