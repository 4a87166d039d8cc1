"""What astra uses of the `verifiers` package, for machines without it: the same names, calls and message objects.

`tests/test_verifiers_env.py` runs on the package itself where that is installed, so the two cannot drift apart unseen.
"""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import sys
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

__version__ = "0.1.14"


class Record:
    """Fields by attribute, key and `model_dump`, as the package's pydantic models have them."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def model_dump(self, exclude_none: bool = False) -> dict[str, Any]:
        found = {name: _dumped(value) for name, value in self.__dict__.items()}
        return {name: value for name, value in found.items() if value is not None or not exclude_none}


def _dumped(value: Any) -> Any:
    if isinstance(value, list):
        return [_dumped(each) for each in value]
    return value.model_dump() if isinstance(value, Record) else value


def _messages(given: Any) -> list[Record]:
    return [one if isinstance(one, Record) else Record(**one) for one in given]


class Error(Exception): ...


class OverlongPromptError(Error): ...


class Client(ABC):
    def __init__(self, client: Any):
        self.client = client

    @abstractmethod
    async def get_native_response(self, *given: Any) -> Any: ...

    @abstractmethod
    async def close(self) -> None: ...


types = ModuleType("verifiers.types")
for _name in ("ToolCall", "ResponseMessage", "ResponseTokens", "Response", "Usage", "Tool"):
    setattr(types, _name, type(_name, (Record,), {}))


class Parser: ...


class Rubric:
    def __init__(self, funcs: Any = None, weights: Any = None, parser: Any = None):
        self.funcs, self.weights = list(funcs or []), list(weights or [1.0] * len(funcs or []))

    def add_metric(self, func: Any) -> None:
        self.funcs.append(func)
        self.weights.append(0.0)

    async def score_group(self, states: list[Any]) -> None:
        for state in states:
            state["reward"], state["metrics"] = 0.0, {}
        for func, weight in zip(self.funcs, self.weights, strict=True):
            wanted = inspect.signature(func).parameters
            if "completions" in wanted:
                values = func(completions=[state["completion"] for state in states])
            else:
                has = ({**state["input"], "completion": state["completion"], "state": state} for state in states)
                values = [func(**{name: each[name] for name in wanted}) for each in has]
            for state, value in zip(states, values, strict=True):
                value = await value if inspect.isawaitable(value) else value
                state["metrics"][func.__name__] = float(value)
                state["reward"] += weight * float(value)

    async def cleanup(self, state: Any) -> None: ...


class Environment:
    def __init__(self, dataset: Any = None, rubric: Any = None, system_prompt: str | None = None, **more: Any):
        begins = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.rubric = rubric or Rubric()
        self.tool_defs: Any = None
        self.dataset = [
            {"example_id": place, "prompt": [*begins, {"role": "user", "content": row["question"]}], **row}
            for place, row in enumerate(dataset)
        ]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(143))

    def get_dataset(self) -> Any:
        return self.dataset

    get_eval_dataset = get_dataset


class MultiTurnEnv(Environment):
    def __init__(self, max_turns: int = -1, **more: Any):
        super().__init__(**more)
        self.max_turns = max_turns
        self.rubric.add_metric(num_turns)

    async def get_prompt_messages(self, state: Any) -> Any:
        if not state["trajectory"]:
            return state["prompt"]
        step = state["trajectory"][-1]
        chat = [*step["prompt"], *step["completion"]]
        return [*chat, *_messages(await self.env_response(chat, state))]

    async def env_response(self, messages: Any, state: Any, **more: Any) -> Any:
        raise NotImplementedError

    async def done(self, state: Any) -> bool:
        return len(state["trajectory"]) >= self.max_turns > 0

    async def rollout(self, input: Any, client: Client, model: str, sampling_args: Any = None) -> Any:
        state = {"input": dict(input), "prompt": _messages(input["prompt"]), "trajectory": [], "error": None}
        try:
            while not await self.done(state):
                prompt = _messages(await self.get_prompt_messages(state))
                tools = self.tool_defs or None
                said = (await client.get_response(prompt, model, sampling_args, tools, state=state)).message  # type: ignore[attr-defined]
                message = Record(role="assistant", content=said.content, tool_calls=said.tool_calls)
                state["trajectory"].append({"prompt": prompt, "completion": [message]})
        except OverlongPromptError:
            state["is_truncated"] = True
        except Error as error:
            state["error"] = error
        chat = [one for step in state["trajectory"][-1:] for one in (*step["prompt"], *step["completion"])]
        state["completion"] = chat[len(state["prompt"]) :]
        return state


def num_turns(state: Any) -> int:
    return len(state["trajectory"])


class SingleTurnEnv(MultiTurnEnv):
    def __init__(self, **more: Any):
        super().__init__(max_turns=1, **more)


class ToolEnv(MultiTurnEnv):
    def __init__(self, tools: Any = (), max_turns: int = 10, **more: Any):
        super().__init__(max_turns=max_turns, **more)
        self._tools = {tool.__name__: tool for tool in tools}
        kinds = {"int": "integer", "str": "string"}
        self.tool_defs = [
            types.Tool(
                name=tool.__name__,
                description=tool.__doc__,
                parameters={
                    "type": "object",
                    "properties": {
                        name: {"type": kinds[one.annotation]}
                        for name, one in inspect.signature(tool).parameters.items()
                    },
                },
            )
            for tool in tools
        ]

    async def done(self, state: Any) -> bool:
        last = state["trajectory"][-1]["completion"][-1] if state["trajectory"] else None
        return await super().done(state) or (last is not None and not last.tool_calls)

    async def env_response(self, messages: Any, state: Any, **more: Any) -> Any:
        found = []
        for call in messages[-1].tool_calls:
            try:
                text = str(self._tools[call.name](**json.loads(call.arguments)))
            except Exception as error:
                text = str(error)
            found.append({"role": "tool", "content": text, "tool_call_id": call.id})
        return found


def load_environment(name: str, **args: Any) -> Environment:
    return importlib.import_module(name.replace("-", "_")).load_environment(**args)  # type: ignore[no-any-return]
