"""Environments as a user of the `verifiers` package writes them, for tests/test_verifiers_env.py."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": "first?", "answer": "b"}, {"question": "second?", "answer": "d"}]


def right(completion: Any, answer: str) -> float:
    return float(answer in str(completion[-1]["content"]))


def longest(completions: Any) -> list[float]:
    lengths = [sum(len(str(one["content"])) for one in each if one["role"] == "assistant") for each in completions]
    return [float(length == max(lengths)) for length in lengths]


class Again(vf.MultiTurnEnv):
    """Says `again 1`, `again 2`; `how` spoils the chat."""

    def __init__(self, how: str = "", **more: Any):
        super().__init__(**more)
        self.how = how

    async def env_response(self, messages: Any, state: Any, **more: Any) -> Any:
        if self.how == "error":
            raise vf.Error("the game is broken")
        said = [{"role": "user", "content": f"again {len(state['trajectory'])}"}]
        return [] if self.how == "silent" else said

    async def get_prompt_messages(self, state: Any) -> Any:
        chat = list(await super().get_prompt_messages(state))
        if self.how == "rewrites" and state["trajectory"]:
            return [*chat[:2], {"role": "assistant", "content": "as I would say it"}, *chat[3:]]
        if self.how == "forgets" and state["trajectory"]:
            return chat[:1]
        return chat


def load_environment(how: str = "", turns: int = 3) -> Any:
    rubric = vf.Rubric(funcs=[right, longest], weights=[1.0, 0.5])
    return Again(how, dataset=Dataset.from_list(ROWS), rubric=rubric, max_turns=turns, system_prompt="Be brief.")


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def with_tool() -> Any:
    return vf.ToolEnv(tools=[add], dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[right]), max_turns=4)
