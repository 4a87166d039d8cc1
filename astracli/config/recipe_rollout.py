"""The table `[rollout]`: the engine, the environment and how answers are drawn. Installed engines add tables to it."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    field_validator,
    model_validator,
)

from astracli.config import doors
from astracli.config.recipe_run import Table

NonEmpty = Annotated[str, Field(min_length=1)]
Requests = Annotated[int, Field(gt=0, le=65_536)]
Tokens = Annotated[int, Field(gt=0, le=2**24)]
RUNNING = 32
"""Sequences that an engine decodes at once where no memory was counted."""
REFILL_PART, REFILL_FROM = 16, 64


class RolloutTable(Table):
    engine: str = "auto"
    """The name of an installed engine, or `auto`: the one that serves by itself on the run's device. What only one
    engine knows stands in its own table, `[rollout.NAME]`."""
    env: str = Field(default="single_turn", min_length=1)
    """How a prompt becomes an episode: `single_turn` (one completion), a name from the entry-point group `astra.envs`,
    or `pkg.mod:Class`."""
    env_timeout_s: PositiveFloat = 60.0
    """Seconds that an environment's own code may take between two calls of the engine or the grader; then its episode
    ends and counts as failed."""
    group_size: int = Field(default=8, gt=0, le=4096)
    """Samples per prompt."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Of the draws. The trainer divides its logits by it too: what is trained is the policy that draws."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Below 1 the draws are not the policy's: that biases the gradient, and is warned of."""
    max_new_tokens: Tokens = 4000
    """Most tokens behind the prompt, in an episode of several turns all of them together."""
    stop: list[NonEmpty] = Field(default=[])
    """A completion ends, as finished, with the token that completes one of these texts; evaluations end there too. What
    was drawn stays whole: the text is part of what is trained and of what a reward sees."""
    context_length: Tokens = 8192
    """Prompt and completion together, tokens; the whole of an episode of several turns."""
    max_running_requests: Requests | Literal["auto"] = "auto"
    """Sequences that one engine decodes at once. Hybrids hold a state cache per sequence beside the KV cache. `auto`:
    as many as fit its GPU, at most what `running_ceiling` says, 32 on a CPU; the plan says how many and why."""
    running_ceiling: dict[str, PositiveInt] = Field(default={})
    """With `auto`: memory of a GPU in whole GiB -> most requests on a GPU that has no more than that. `{ 48 = 32 }`: 32
    on a GPU of 44 GiB, as many as fit on one of 80."""
    refill_requests: Requests | Literal["auto"] = "auto"
    """Free slots that an engine is given new requests for at once, or fewer after a quarter of a second: taking up one
    request keeps an engine from decoding nearly as long as taking up many. `auto`: a sixteenth of its slots, where it
    has 64 or more; else 1. Engines whose client sends groups whole take them as they come."""
    max_dropped_batches: NonNegativeInt = 8
    """The run ends when so many batches' worth of groups (x `train.batch_groups`) in a row were dropped because all
    their samples earned the same; 0 goes on generating."""

    @classmethod
    def brought(cls) -> dict[str, type[Table]]:
        return doors.settings("astra.engines")

    @model_validator(mode="wrap")
    @classmethod
    def _with_engines(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A table with those of the installed engines inside: looked up here, for an engine may import this module."""
        if cls is RolloutTable and isinstance(values, dict):
            return cast(Self, _with_engines().model_validate(values))
        return handler(values)

    @field_validator("max_running_requests", mode="before")
    @classmethod
    def _null_is_auto(cls, value: Any) -> Any:
        """Run directories of earlier versions say null."""
        return "auto" if value is None else value

    @property
    def running(self) -> int:
        """`max_running_requests`; before a plan has derived it, and on a CPU, `RUNNING`."""
        return RUNNING if self.max_running_requests == "auto" else self.max_running_requests

    @property
    def refill(self) -> int:
        """`refill_requests`, at most the slots."""
        if self.refill_requests == "auto":
            return self.running // REFILL_PART if self.running >= REFILL_FROM else 1
        return min(self.refill_requests, self.running)

    def ceiling(self, gpu_gib: float) -> tuple[int, int] | None:
        """(GiB, requests): the entry of `running_ceiling` for a GPU of so much memory; None when there is none."""
        entries = ((int(key), most) for key, most in self.running_ceiling.items())
        return min((entry for entry in entries if gpu_gib <= entry[0]), default=None)

    def completion_room(self, prompt_tokens: int) -> int:
        """Tokens that a completion of a prompt of so many may have; below 1: the prompt does not fit."""
        return min(self.max_new_tokens, self.context_length - prompt_tokens)


@cache
def _with_engines() -> type[RolloutTable]:
    fields: dict[str, Any] = {name: (table, table()) for name, table in RolloutTable.brought().items()}
    return create_model("RolloutTable", __base__=RolloutTable, **fields)
