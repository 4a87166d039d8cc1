"""The game of docs/extending.md: two to four turns, a reward at the end; what trains is what was drawn."""

from __future__ import annotations

import asyncio
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from chat_models import Lines, asked
from rollout_world import recipe

from astracli.envs import registry
from astracli.envs.attempt import attempt, score
from astracli.envs.contract import EnvSetup, Episode
from astracli.envs.prompt_tokens import PromptTokens
from astracli.evaluation.episodes import whole
from astracli.models.adapter import load_tokenizer
from astracli.models.chat import ChatFormat

FOLDER = Path(__file__).parents[1] / "examples" / "envs"


def test_a_game_of_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "guess", raising=False)
    source = (FOLDER / "guess.py").read_text().partition("from astracli")[2]
    assert len([line for line in source.splitlines() if line]) <= 15
    coder = load_tokenizer(Path(str(files("astracli") / "assets" / "tiny")))
    chosen = recipe(rollout={"env": "guess:Guess"})
    no_grader = lambda problem: None  # noqa: E731
    env = registry.find("guess:Guess")(EnvSetup(chosen, coder, no_grader, PromptTokens(coder, ChatFormat())))

    async def scenario() -> None:
        episodes = []
        for lines in (["2"], ["9", "1", "2"], ["0", "1", "+", "4"]):
            policy = Lines(coder, lines)
            episode = await attempt(env, asked("37+45", "82"), policy, 60.0, whole)
            assert isinstance(episode, Episode), episode
            assert [turn.tokens.tolist() for _, turn in policy.drawn] == [
                episode.tokens[a:b].tolist() for a, b in episode.spans
            ]
            episodes.append(episode)
        assert env.text(episodes[1].tokens) == "37+45=9-=1+=2", "higher or lower, and what opens the next turn"
        assert [one.parts for one in episodes] == [
            {"turns": 1, "found": 1},
            {"turns": 3, "found": 1},
            {"turns": 4, "found": 0},
        ]
        scores = await score(env, asked("37+45", "82"), episodes, 60.0)
        assert isinstance(scores, list) and [one.reward for one in scores] == [1.0, 0.5, 0.0]

    asyncio.run(scenario())
