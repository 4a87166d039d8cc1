"""An environment for benches: completions with a tool's time and result between them."""

from __future__ import annotations

import asyncio

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, Episode, Policy


class ManyTurns(Env):
    """Who measures sets `turns`, `tool_s` (seconds between two turns) and `told` (tokens of a tool's result)."""

    turns, tool_s, told = 5, 0.1, 24

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode = self.begin(problem)
        filler = [int(token) for token in episode.tokens[:1]] * self.told
        for turn in range(self.turns):
            if turn:
                await asyncio.sleep(self.tool_s)
                episode.tell(filler)
            episode.add(await policy.generate(episode.tokens))
        episode.parts["turns"] = float(self.turns)
        return episode
