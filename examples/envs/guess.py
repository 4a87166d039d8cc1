"""A game for astra: guess the last digit of a sum in at most four turns; after each the model hears higher or lower."""

from astracli.envs.contract import Env


class Guess(Env):
    async def run(self, problem, policy):
        episode, secret = self.begin(problem), problem.answer[-1]
        for turn in range(1, 5):
            episode.add(await policy.generate(episode.tokens, budget=1))
            guess = self.text(episode.answer).strip()
            episode.parts = {"turns": turn, "found": guess == secret}
            if guess == secret or turn == 4:
                return episode
            self.say(episode, "+" if guess < secret else "-")

    async def score(self, group, problem):
        return [episode.parts["found"] * (5 - episode.parts["turns"]) / 4 for episode in group]
