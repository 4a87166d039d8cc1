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
    """The name of an installed engine. `auto`: the default engine of the run's device. Settings that only one engine
    has are in its own table, `[rollout.NAME]`."""
    env: str = Field(default="single_turn", min_length=1)
    """How a prompt becomes an episode: `single_turn` (one completion), a name from the entry-point group `astra.envs`,
    or `pkg.mod:Class`."""
    env_timeout_s: PositiveFloat = 60.0
    """Time limit, in seconds, for the environment's own code between two calls of the engine or the grader. After it
    the episode ends and counts as failed."""
    group_size: int = Field(default=8, gt=0, le=4096)
    """Samples per prompt."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Sampling temperature. The trainer divides its logits by it too, so it trains the policy that samples."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Below 1 the samples do not follow the policy. This biases the gradient, and the plan warns about it."""
    max_new_tokens: Tokens = 4000
    """Largest number of generated tokens; in an episode of several turns, of all turns together."""
    stop: list[NonEmpty] = Field(default=[])
    """A completion ends, as finished, with the token that completes one of these texts. Evaluations use them too. The
    text stays part of the completion: it is trained on, and rewards see it."""
    context_length: Tokens = 8192
    """Largest number of tokens of prompt and completion together, or of a whole episode of several turns."""
    max_running_requests: Requests | Literal["auto"] = "auto"
    """How many sequences one engine decodes at once. A hybrid model needs memory for a recurrent state per sequence
    besides the KV cache. `auto`: as many as fit on its GPU, at most what `running_ceiling` allows; 32 on a CPU. The
    plan shows the number and the reason."""
    running_ceiling: dict[str, PositiveInt] = Field(default={})
    """With `auto`: memory of a GPU in whole GiB -> most requests on a GPU with at most this memory. With `{ 48 = 32 }`,
    a GPU of 44 GiB runs at most 32 requests, and a GPU of 80 GiB as many as fit."""
    refill_requests: Requests | Literal["auto"] = "auto"
    """An engine gets new requests when this many of its slots are free, or after a quarter of a second. Taking up one
    request stops decoding for nearly as long as taking up many. `auto`: a sixteenth of the slots where an engine has 64
    or more, otherwise 1. It matters for engines whose client sends each request by itself."""
    prefix_cache: Literal["auto", "on", "off"] = "auto"
    """Whether an engine keeps the keys and values of prompts for later requests with the same beginning: the samples of
    a group, the turns of an episode. Entries that older weights computed are never used. On a hybrid it costs memory
    for further recurrent states. `auto`: where it costs nothing and the engine has one; the plan shows the reason."""
    max_dropped_batches: NonNegativeInt = 8
    """Groups in which all samples have the same reward are dropped. The run ends after this many batches (x
    `train.batch_groups` groups) were dropped in a row. 0: it never ends for this reason."""

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
