"""The table `[env]`: what an environment of several turns is told. `rollout.env` says which environment it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from astracli.config.recipe_run import Table

Tokens = Annotated[int, Field(gt=0, le=2**24)]
ToolFormat = Literal["hermes", "qwen_xml", "llama_json", "code"]


class EnvTable(Table):
    tools: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Functions that the model may call, with `rollout.env = "tools"`: `python` (runs a program), `calculator`, or your
    own as `pkg.mod:function`. The model is told a function's types and its docstring."""
    format: Literal["auto"] | ToolFormat = "auto"
    """How the model writes a call: `hermes` (JSON between `<tool_call>` tags), `qwen_xml` (`<function=NAME>` with
    `<parameter=KEY>`), `llama_json` (a turn that is one JSON object), `code` (a block of Python is run by the tool
    `python`). `auto`: the format that the model's chat template uses."""
    max_turns: PositiveInt = 8
    """Largest number of the model's turns in an episode. Calls in the last turn are not run."""
    max_turn_tokens: Tokens | None = None
    """Largest number of tokens that the model generates in a turn. A turn that is cut off ends its episode. None: as
    many as fit."""
    max_tool_tokens: Tokens = 512
    """Largest number of tokens of a tool's result. The rest is cut off, and the model is told so."""
    tool_timeout_s: PositiveFloat = 10.0
    """Time limit of a call, in seconds. After it the call and all processes that it started are killed, and the model
    is told so."""
    tool_memory_gib: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """Address space of each process of a call."""
    tool_processes: PositiveInt = 16
    """How many processes a call may have at once, including its own."""
    tool_concurrency: PositiveInt | None = None
    """How many calls run at once in each process that plays episodes. Other calls wait, and this time does not count
    against their limit. None: four per core."""
    args: dict[str, Any] = Field(default={})
    """Settings for an environment of your own, which reads them as `self.recipe.env.args`. With `rollout.env =
    "verifiers"`: `id`, the environment's name, and `args`, what it is loaded with."""
