"""The table `[lora]` of a recipe: low-rank adapters are trained, and the model's own weights stay as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator
from pydantic_core import PydanticCustomError

from astracli.config.recipe_run import Table


class LoraTable(Table):
    """With this table a run trains LoRA adapters: a matrix W is used as W + alpha / rank * B A, rounded to the dtype of
    the engine's weights, and only A and B are trained. All else is frozen. [How-to](recipes-howto.md#lora)."""

    rank: int = Field(default=16, gt=0, le=1024)
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """The product B A is multiplied by `alpha / rank`."""
    targets: Literal["auto"] | list[Annotated[str, Field(min_length=1)]] = "auto"
    """Linear layers that get an adapter, by their last names, such as `["q_proj", "v_proj"]`; `auto` takes those that
    the model's adapter names: projections of attention, of Gated DeltaNet layers and of MLPs."""
    dropout: float = 0.0
    """0 is the only value: with dropout, trainer and engine would compute with different policies."""

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            hint = "leave it out: the trainer's policy must be the one that the engine samples from"
            raise PydanticCustomError("refused", "is not allowed: it takes 0", {"hint": hint})
        return value

    @field_validator("targets")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            hint = 'name layers, for example `["q_proj", "v_proj"]`, or take "auto"'
            raise PydanticCustomError("refused", "names no layer", {"hint": hint})
        return value
