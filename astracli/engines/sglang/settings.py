"""The table `[rollout.sglang]` of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from astracli.config.recipe_run import Table

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe

NAME = "sglang"


class SglangTable(Table):
    attention_backend: str = "auto"
    """SGLang's `--attention-backend`. `auto`: the one that the backend table chooses for this GPU."""
    linear_attention_backend: str = "auto"
    """SGLang's `--linear-attn-backend`, of a hybrid model. `auto`: as for `attention_backend`."""
    mem_fraction_static: float = Field(default=0.7, gt=0.0, lt=1.0)
    """Share of its GPU's memory that an engine reserves for weights, recurrent state and KV cache. On a GPU that it
    shares with a trainer (`resources.share_gpus`) it reserves at most what the trainer leaves."""
    chunked_prefill_size: PositiveInt = 8192
    """Tokens of one prefill chunk. It bounds the memory for the fp32 logits of a prefill."""
    prefill_delay_ratio: float = Field(default=0.0, ge=0.0, le=0.5)
    """SGLang's prefill delayer: it takes up new requests when this share of the number that runs is waiting, or after a
    tenth of a second, and only when as many slots are free as its largest prefill filled. 0: at once. Requests already
    come in bursts (`rollout.refill_requests`); the delayer keeps a burst together whose requests arrive one by one."""


def own(recipe: Recipe) -> SglangTable:
    table: SglangTable = getattr(recipe.rollout, NAME)
    return table
