"""Episodes of an Env on one engine, run at once; and what their errors lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from astracli.data.prompts import Problem
from astracli.envs.attempt import Failure, attempt
from astracli.envs.contract import Env, Episode
from astracli.errors import RunFailed
from astracli.rollout.policy import EngineCalls, EpisodePolicy, RolloutSampling
from astracli.rollout.request_gate import EngineLost, RequestGate

FAILED_IN_A_ROW = 64
"""Episodes in a row that end in an error, after which the run ends in that error's words."""


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
        return await attempt(env, problem, policy, limit_s, policy.check)
    finally:
        policy.end()


def leaves(error: Exception) -> list[Exception]:
    """The failures inside nested groups, in order."""
    if isinstance(error, ExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]
