"""The environment of tools: the model calls functions in its own format, and goes on with their results.

A turn that calls nothing ends the episode, and so does one that is cut off, the last of `env.max_turns`, or results
that leave no room. Results stand between the turns as tokens that are not trained. What was meant as a call and is
none is answered as such. The recipe's reward grades the last turn; `turns`, `tool_calls`, `tool_errors` and
`tool_tokens` are figures of each episode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from astracli.data.prompts import Problem
from astracli.envs.contract import Env, EnvSetup, Episode, Policy, Turn
from astracli.envs.tools import formats, functions
from astracli.envs.tools.calls import Result, ToolCalls
from astracli.envs.tools.formats import Found, Malformed
from astracli.envs.tools.functions import BadCall
from astracli.errors import UserError
from astracli.models.chat import ChatFormat


class ToolEnv(Env):
    """`rollout.env = "tools"`. A subclass may name functions of its own as `tools`, besides those of `env.tools`."""

    tools: Sequence[Callable[..., Any]] = ()

    def __init__(self, setup: EnvSetup):
        super().__init__(setup)
        self.table = setup.recipe.env
        self.found = functions.loaded([*self.table.tools, *self.tools])
        if not self.found:
            raise UserError(
                f'rollout.env = "{self.recipe.rollout.env}" has no tools',
                "name some: `--set 'env.tools=[\"python\"]'`, or your own as `pkg.mod:function`",
            )
        self.chat = ChatFormat.of(self.recipe)
        name = self.table.format
        self.format_name = formats.of_template(self.tokenizer, self.chat) if name == "auto" else name
        self.format = formats.FORMATS[self.format_name]
        opened = self.chat.render(self.tokenizer, [{"role": "user", "content": "0"}]).rstrip()
        self.opened = "<think>" if opened.endswith("<think>") else ""
        """What the template writes of a turn before the model draws it, as far as parsers need it."""
        self.calls = ToolCalls([tool.spec for tool in self.found.values()], self.table)
        if self.format_name == "code":
            if list(self.found) != ["python"]:
                raise UserError(
                    'env.format = "code" runs blocks of Python: it takes the tool `python` and no other, not '
                    + ", ".join(f"`{each}`" for each in self.found),
                    "`--set 'env.tools=[\"python\"]'`, or another env.format",
                )
        else:
            self.schemas = functions.schemas(self.found)
        self.conversation.check(self.format.role)

    def close(self) -> None:
        self.calls.close()

    def check(self, problem: Problem) -> None:
        """Raises UserError when the prompt of a problem does not name the tools, or their process does not start."""
        text = str(self.tokenizer.decode([int(token) for token in self.prompt(problem)]))
        untold = [name for name in self.found if name not in text]
        if untold and self.format_name != "code":
            raise UserError(
                f"the model is not told of the tool `{untold[0]}`: its chat template takes no tools",
                "describe the tools in data.system, by their names; or take env.format=code with the tool `python`",
            )
        self.calls.check()

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        episode, figures = self.begin(problem), {"turns": 0, "tool_calls": 0, "tool_errors": 0, "tool_tokens": 0}
        prompt = len(episode.tokens)
        while True:
            turn = await policy.generate(episode.tokens, budget=self.table.max_turn_tokens)
            episode.add(turn)
            figures["turns"] += len(turn.tokens) > 0
            called = self.format.parse(self.written(turn)) if turn.finish == "stop" else []
            if not called or figures["turns"] >= self.table.max_turns:
                break
            results = await asyncio.gather(*(self.answer(one, problem) for one in called))
            figures["tool_calls"] += len(called)
            figures["tool_errors"] += sum(result.failed for result in results)
            length = len(episode.tokens)
            told = [{"role": self.format.role, "content": self.worded(result)} for result in results]
            self.say(episode, told if self.format.role == "tool" else [self._together(told)])
            if self._room(prompt, len(episode.tokens)) < 1:
                episode.cut(length)
                break
            figures["tool_tokens"] += len(episode.tokens) - length
        episode.parts |= figures
        return episode

    def written(self, turn: Turn) -> str:
        """The text of a turn as formats read it: with special tokens, but the one that ends it."""
        tokens = turn.tokens.tolist()
        if tokens and tokens[-1] in (self.tokenizer.all_special_ids or ()):
            tokens = tokens[:-1]
        return self.opened + str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    async def answer(self, call: Found, problem: Problem) -> Result:
        """The result of what a turn has called. A subclass may look at the problem's row."""
        if isinstance(call, Malformed):
            return Result(call.reason, failed=True)
        tool = self.found.get(call.name)
        if tool is None:
            return Result(f"there is no tool `{call.name}`; there is: {', '.join(self.found)}", failed=True)
        try:
            arguments = tool.checked(call.arguments, written=call.written)
        except BadCall as error:
            return Result(str(error), failed=True)
        return await self.calls.call(tool.spec, arguments)

    def worded(self, result: Result) -> str:
        """What the model reads of a result: at most `env.max_tool_tokens`."""
        text, most = f"error: {result.text}" if result.failed else result.text, self.table.max_tool_tokens
        tokens = self.encode(text)
        if len(tokens) > most:
            text = f"{self.text(tokens[:most])}\n[{len(tokens) - most} more tokens are cut off]"
        return text

    def _together(self, told: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The outputs of blocks of code, as one turn of the user."""
        blocks = [f"```output\n{each['content'].rstrip()}\n```" for each in told]
        return {"role": self.format.role, "content": "\n".join(blocks)}

    def _room(self, prompt: int, length: int) -> int:
        """Tokens that may still be drawn."""
        return self.recipe.rollout.completion_room(prompt) - (length - prompt)
