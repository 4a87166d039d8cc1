"""What a recipe's `[lora]` asks of the checkpoint before a start: targets, and files that engines can merge into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.models import checkpoint_files, lora_targets
from astracli.models.adapter import ModelAdapter
from astracli.weights.format.manifest import BASE_BYTES


def check(folder: Path, recipe: Recipe, adapter: ModelAdapter, config: Mapping[str, Any]) -> None:
    """Raise UserError when a target is none of the model's, or when an adapter is to travel and engines could not read
    the matrices that it belongs to. Nothing for a model whose tensors are known only after loading."""
    if recipe.lora is None or adapter.shapes is None:
        return
    targets = lora_targets.chosen(recipe.lora, adapter, adapter.shapes(config))
    if recipe.weights.transfer != "adapter":
        return
    places = checkpoint_files.places(folder, adapter)
    odd = [name for name in targets if name not in places or places[name].dtype not in BASE_BYTES]
    if odd:
        held = places[odd[0]].dtype if odd[0] in places else "no safetensors file"
        raise UserError(
            f"weights.transfer = adapter: engines merge adapters into the matrices of `{folder}`, which must be "
            f"{', '.join(BASE_BYTES)}; `{odd[0]}` is in {held}",
            "send merged weights with `--set weights.transfer=delta`",
        )
