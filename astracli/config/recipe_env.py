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
    own as `pkg.mod:function`. Types and docstring of a function are what the model is told of it."""
    format: Literal["auto"] | ToolFormat = "auto"
    """How the model writes a call: `hermes` (JSON between `<tool_call>` tags), `qwen_xml` (`<function=NAME>` with
    `<parameter=KEY>`), `llama_json` (a turn that is one JSON object), `code` (a block of Python is run by the tool
    `python`). `auto` takes that in which the model's chat template writes calls."""
    max_turns: PositiveInt = 8
    """Turns of the model in an episode; what the last one calls is not run."""
    max_turn_tokens: Tokens | None = None
    """Most tokens that the model draws in a turn. A turn that is cut off ends its episode. None: as many as fit."""
    max_tool_tokens: Tokens = 512
    """Most tokens of a tool's result; the rest is cut off, and the model is told so."""
    tool_timeout_s: PositiveFloat = 10.0
    """Seconds that a call may take; then it is killed with all that it started, and the model is told so."""
    tool_memory_gib: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """Memory (address space) of a process of a call."""
    tool_processes: PositiveInt = 16
    """Processes that a call may have at once, its own included."""
    tool_concurrency: PositiveInt | None = None
    """Calls that run at once in a process that plays episodes; others wait, and waiting is not counted as their time.
    None: four for each core."""
    args: dict[str, Any] = Field(default={})
    """For an environment of your own, which reads them as `self.recipe.env.args`."""
