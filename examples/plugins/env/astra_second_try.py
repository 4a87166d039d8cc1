"""An environment for astra: the model answers, is asked again, and its second answer counts."""

from astracli.envs.contract import Env


class SecondTry(Env):
    async def run(self, problem, policy):
        episode = self.begin(problem)
        episode.add(await policy.generate(episode.tokens, budget=8))
        episode.tell(self.encode("="))
        episode.add(await policy.generate(episode.tokens))
        return episode
