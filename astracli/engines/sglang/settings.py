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
    linear_attention_backend: str = "auto"
    mem_fraction_static: float = Field(default=0.7, gt=0.0, lt=1.0)
    """Part of its GPU that an engine reserves for weights, recurrent state and KV cache. At most: beside a trainer
    (`resources.share_gpus`) it is what that one leaves."""
    chunked_prefill_size: PositiveInt = 8192
    """Tokens of one prefill chunk; bounds the fp32 logits of a prefill."""
    prefill_delay_ratio: float = Field(default=0.0, ge=0.0, le=0.5)
    """SGLang's prefill delayer: it takes up new requests only when so many wait, as a part of those that run, or after
    a tenth of a second, and when as many slots are free as its largest prefill filled. 0: at once. Requests already come
    in bursts (`rollout.refill_requests`); this keeps together what of a burst arrives late."""


def own(recipe: Recipe) -> SglangTable:
    table: SglangTable = getattr(recipe.rollout, NAME)
    return table
