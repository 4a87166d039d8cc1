"""The table `[sft]` of a recipe: supervised training on examples, `astra sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from astracli.config.recipe_run import Table


class SftTable(Table):
    """With this table a recipe is one of `astra sft`: it trains on examples from `[data]`, with cross entropy.
    `train.batch_groups` is then the number of examples in a step. [How-to](sft-howto.md)."""

    completion_field: str = Field(default="completion", min_length=1)
    """Column with what the model should answer. The prompt is what `data.question_field` holds, with the recipe's
    template, system turn and examples. A row without this column gives chat turns that end with one of the assistant
    (in `data.question_field`, or in `messages`). For `arithmetic` the answer is the worked solution."""
    loss_on: Literal["all", "last"] = "all"
    """Which assistant turns of a row are trained, each with the token that ends it. Turns of `data.few_shot` never are.
    `all` needs a chat template that can be rendered in parts, as multi-turn rollouts do."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """This share of the targets (never of the inputs) is another token, drawn uniformly from the tokens that the
    tokenizer writes text with and the end token. Its mean over draws is cross entropy with smoothed labels."""
