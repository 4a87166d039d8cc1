"""The table `[rollout.vllm]` of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from astracli.config.recipe_run import Table

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe

NAME = "vllm"


class VllmTable(Table):
    attention_backend: str = "auto"
    """vLLM's attention backend: `flash_attn`, `flashinfer` or `triton_attn`. `auto`: vLLM's own choice."""
    gpu_memory_utilization: float = Field(default=0.7, gt=0.0, lt=1.0)
    """Share of its GPU's memory that an engine takes for weights, recurrent state and KV cache. On a GPU that it
    shares with a trainer (`resources.share_gpus`) it takes at most what the trainer leaves."""
    max_num_batched_tokens: PositiveInt = 8192
    """Most tokens of one step, those of a prefill chunk included."""
    enforce_eager: bool = False
    """No CUDA graphs: a quicker start, slower decoding."""


def own(recipe: Recipe) -> VllmTable:
    table: VllmTable = getattr(recipe.rollout, NAME)
    return table
