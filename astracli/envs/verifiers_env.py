"""The environments of the `verifiers` package, as they are: they run a rollout, and a client of ours is the model.

    the package's rollout ──> PolicyClient: messages in ──> our episode: what is new, by the chat template
                          <── message: text, calls      <── policy: a turn, token in and token out

An environment of the package sends the whole chat each time. What is already in the episode stays as it was drawn, and
only the messages behind it are told. A chat that does not go on from the last one (history written anew, turns left
out) would train on what was never drawn: it is refused, and the episode fails with the reason.

The package's rubric scores a group. Its weighted sum is the reward, its other figures are logged.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as data_field
from typing import Any

from astracli.data.prompts import Problem
from astracli.data.turns import RowError, Turn
from astracli.envs import verifiers_package as package
from astracli.envs.contract import Env, EnvSetup, Episode, Policy, Score
from astracli.envs.contract import Turn as Drawn
from astracli.envs.tools import formats
from astracli.envs.tools.formats import Call, Found
from astracli.errors import UserError
from astracli.models.chat import ChatFormat


class NotContinued(Exception):
    """The environment's chat does not go on from what was drawn."""


@dataclass
class Played(Episode):
    """An episode with the package's state of it, which its rubric scores."""

    state: Any = data_field(default=None, repr=False, compare=False)


class VerifiersEnv(Env):
    """`rollout.env = "verifiers"`; `env.args` has the environment's `id`, and `args`, what it is loaded with."""

    def __init__(self, setup: EnvSetup):
        super().__init__(setup)
        given = dict(setup.recipe.env.args)
        name, args = given.pop("id", None), given.pop("args", {})
        if not (isinstance(name, str) and name) or not isinstance(args, Mapping) or given:
            raise UserError(
                'rollout.env = "verifiers" takes `env.args.id` (text), `env.args.args` (a table) and nothing else',
                "`--set env.args.id=NAME`",
            )
        self.vf, self.name = package.package(), name
        self.theirs = package.load(name, args)
        self.schemas = package.schemas(getattr(self.theirs, "tool_defs", None))
        self._client = _client_class(self.vf)
        self._rows: dict[str, Any] = {}
        self.format_name = ""
        if self.schemas:
            table = setup.recipe.env.format
            self.format_name = (
                formats.of_template(self.tokenizer, ChatFormat.of(self.recipe)) if table == "auto" else table
            )
            if self.format_name == "code":
                raise UserError("env.format = code: the environments of verifiers have tools of their own", "use auto")
        if getattr(self.theirs, "max_turns", -1) != 1:
            self.conversation.check("tool" if self.schemas else "user")

    def row(self, problem: Problem) -> dict[str, Any]:
        """The package's own row of a problem. Raises UserError when the problem comes from elsewhere."""
        place, split = problem.row.get(package.ROW), problem.row.get(package.SPLIT)
        if not isinstance(place, int) or split not in package.SPLITS:
            raise UserError(
                f"a row of the data has no `{package.ROW}`: it does not come from the environment `{self.name}`",
                f"`python -m astracli.envs.verifiers_package {self.name} F.jsonl`, then `--set data.source=F.jsonl`",
            )
        if split not in self._rows:
            self._rows[split] = package.dataset(self.theirs, split)
        rows = self._rows[split]
        if not 0 <= place < len(rows):
            raise UserError(f"row {place} of `{self.name}`: it has {len(rows)} to {split}", "write its rows again")
        return dict(rows[place])

    def check(self, problem: Problem) -> None:
        self.row(problem)
        self.prompt(problem)

    async def run(self, problem: Problem, policy: Policy) -> Episode:
        row, dialogue = self.row(problem), Dialogue(self, policy)
        state = await self.theirs.rollout(row, self._client(dialogue), "policy", {})
        episode = dialogue.episode
        if (error := state.get("error")) is not None:
            raise RuntimeError(f"the environment `{self.name}` ended the episode: {error!r}") from (
                error if isinstance(error, BaseException) else None
            )
        if episode is None:
            raise RuntimeError(f"the environment `{self.name}` ended the episode before the first turn")
        episode.state, episode.parts = state, {"turns": float(dialogue.turns)}
        return episode

    async def score(self, group: Sequence[Episode], problem: Problem) -> Sequence[Score | float]:
        states = [episode.state for episode in group if isinstance(episode, Played)]
        rubric, right_at = self.theirs.rubric, self.recipe.data.right_at
        await rubric.score_group(states)
        for state in states:
            await rubric.cleanup(state)
        limit = float(getattr(self.theirs, "pass_threshold", 0.5)) if right_at is None else right_at
        return [
            Score(
                float(state["reward"]),
                "right" if state["reward"] >= limit else "wrong",
                parts={str(name): float(value) for name, value in (state["metrics"] or {}).items()},
            )
            for state in states
        ]


class Dialogue:
    """One episode as the package's rollout makes it go on."""

    def __init__(self, env: VerifiersEnv, policy: Policy):
        self.env, self._policy = env, policy
        self.episode: Played | None = None
        self.turns = 0
        self._known: list[Turn] = []
        """The chat up to and with the last answer, as the package has it."""
        self._numbers = itertools.count(1)

    async def answer(self, prompt: Any, tools: Any) -> dict[str, Any]:
        """The next turn as an assistant's message, with the tokens that it is made of.

        Raises NotContinued, and the package's OverlongPromptError when no room is left, by which it ends the episode.
        """
        env = self.env
        length = len(self.episode.tokens) if self.episode is not None else 0
        try:
            chat = package.plain(prompt)
        except RowError as error:
            raise NotContinued(f"the environment `{env.name}` asks with what is no text: {error}") from None
        episode = self._told(chat, tools)
        context = episode.tokens
        turn = await self._policy.generate(context, budget=env.recipe.env.max_turn_tokens)
        if not len(turn.tokens):
            if not length:
                raise ValueError(f"the environment's prompt of {len(context)} tokens leaves no room for an answer")
            episode.cut(length)
            raise env.vf.OverlongPromptError("no room is left in rollout.context_length or rollout.max_new_tokens")
        episode.add(turn)
        self.turns += 1
        content, calls = self._read(turn)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = calls
        self._known = [*chat, *package.plain([message])]
        return {
            **message,
            "prompt_ids": context.tolist(),
            "completion_ids": turn.tokens.tolist(),
            "logprobs": turn.logprobs.tolist(),
            "finish": "length" if turn.finish == "length" else "tool_calls" if calls else "stop",
        }

    def _told(self, chat: list[Turn], tools: Any) -> Played:
        """The episode with all of a chat in it: what is new is told."""
        env, known = self.env, self._known
        if self.episode is None:
            tokens = ChatFormat.of(env.recipe).tokens(env.tokenizer, chat, package.schemas(tools))
            self.episode = Played.of_prompt(tokens, chat)  # type: ignore[assignment]
            assert self.episode is not None
            return self.episode
        for place, before in enumerate(known):
            if place >= len(chat) or chat[place] != before:
                what = "leaves out" if place >= len(chat) else "writes anew"
                raise NotContinued(
                    f"the environment `{env.name}` {what} message {place + 1} of its chat, of `{before['role']}`: what "
                    "trains must follow what it was drawn after, so only environments that add to their chat can run"
                )
        if len(chat) == len(known):
            raise NotContinued(f"the environment `{env.name}` asks for another turn and says nothing before it")
        env.say(self.episode, chat[len(known) :])
        return self.episode

    def _read(self, turn: Drawn) -> tuple[str, list[dict[str, str]]]:
        """(text, calls of tools) of a turn. What was meant as a call and is none goes to the environment as a call
        whose arguments cannot be read: it answers that as it answers every such call."""
        env = self.env
        text = env.text(turn.tokens)
        if not env.format_name or turn.finish != "stop":
            return text, []
        tool_format = formats.FORMATS[env.format_name]  # type: ignore[index]
        found = tool_format.parse(str(env.tokenizer.decode(turn.tokens.tolist(), skip_special_tokens=False)))
        calls = [self._call(one) for one in found]
        return (text.partition(tool_format.opening)[0].strip() if calls else text), calls

    def _call(self, found: Found) -> dict[str, str]:
        number = f"call_{next(self._numbers)}"
        if isinstance(found, Call):
            arguments = self._typed(found) if found.written else dict(found.arguments)
            return {"id": number, "name": found.name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": number, "name": "", "arguments": found.reason}

    def _typed(self, call: Call) -> dict[str, Any]:
        """Arguments that came as text, as what the tool's schema says they are."""
        functions = (schema["function"] for schema in self.env.schemas)
        of: Any = next((f["parameters"].get("properties", {}) for f in functions if f["name"] == call.name), {})
        found: dict[str, Any] = {}
        for name, text in call.arguments.items():
            found[name] = text
            if of.get(name, {}).get("type") != "string":
                with contextlib.suppress(ValueError):
                    found[name] = json.loads(text)
        return found


def _client_class(vf: Any) -> Any:
    """A client of the package that asks a `Dialogue` in place of a server."""
    types = vf.types

    async def get_response(
        self: Any, prompt: Any, model: str, sampling_args: Any = None, tools: Any = None, **_: Any
    ) -> Any:
        said = await self.client.answer(prompt, tools)
        ids, drawn = said.pop("prompt_ids"), said.pop("completion_ids")
        logprobs, finish = said.pop("logprobs"), said.pop("finish")
        tokens = types.ResponseTokens(
            prompt_ids=ids, prompt_mask=[0] * len(ids), completion_ids=drawn, completion_mask=[1] * len(drawn),
            completion_logprobs=logprobs,
        )  # fmt: skip
        usage = types.Usage(
            prompt_tokens=len(ids), reasoning_tokens=0, completion_tokens=len(drawn), total_tokens=len(ids) + len(drawn)
        )
        calls = [types.ToolCall(**call) for call in said.pop("tool_calls", ())] or None
        cut = finish == "length"
        message = types.ResponseMessage(**said, tool_calls=calls, finish_reason=finish, is_truncated=cut, tokens=tokens)
        return types.Response(id="", created=int(time.time()), model=model, usage=usage, message=message)

    def unused(self: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("answers come from the policy, not from a server")

    methods = dict.fromkeys(vf.Client.__abstractmethods__, unused)
    return type("PolicyClient", (vf.Client,), {**methods, "get_response": get_response})
