"""The environment of one turn: the recipe's prompt, one completion."""

from __future__ import annotations

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, Episode, Policy


class SingleTurnEnv(Env):
    """`rollout.env = "single_turn"`, the default."""

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        episode.add(await policy.generate(episode.tokens))
        return episode
