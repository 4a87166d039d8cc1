"""Which matrices of a model get a LoRA adapter: a recipe's `lora.targets` against the names of its tensors. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from astracli.config.recipe_lora import LoraTable
from astracli.errors import UserError
from astracli.models.adapter import MemoryShape, ModelAdapter

_WEIGHT = ".weight"
_BLOCKS = ".layers."


def chosen(
    table: LoraTable, adapter: ModelAdapter, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """{tensor name: (outputs, inputs)} of the matrices that get an adapter, in the order of `shapes`, which holds every
    trained tensor by name. Raises UserError naming a target that fits no matrix of the blocks."""
    matrices = {
        name: (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and _BLOCKS in name and name.endswith(_WEIGHT)
    }
    wanted = list(adapter.lora_targets) if table.targets == "auto" else table.targets
    if not wanted:
        return matrices
    found: dict[str, tuple[int, int]] = {}
    unknown = []
    for target in wanted:
        fits = {name: shape for name, shape in matrices.items() if _fits(name.removesuffix(_WEIGHT), target)}
        found |= fits
        if not fits and table.targets != "auto":
            unknown.append(target)
    if unknown or not found:
        there = ", ".join(dict.fromkeys(last_name(name) for name in matrices))
        names = ", ".join(f"`{name}`" for name in unknown or wanted)
        raise UserError(f"lora.targets: no linear layer of this model's blocks is named {names}", f"there is: {there}")
    return {name: shape for name, shape in matrices.items() if name in found}


def parameters(table: LoraTable, targets: Mapping[str, tuple[int, int]]) -> int:
    """Of all adapters together."""
    return sum(table.rank * sum(shape) for shape in targets.values())


def sized(shape: MemoryShape, table: LoraTable | None, adapter: ModelAdapter, config: Mapping[str, Any]) -> MemoryShape:
    """The sizes of a model with the adapters of a recipe. Estimated, as seven matrices of one size a block, for a model
    whose tensors are not known before it is loaded."""
    if table is None:
        return shape
    if adapter.shapes is not None:
        targets = chosen(table, adapter, adapter.shapes(config))
        count = sum(outputs * inputs for outputs, inputs in targets.values())
        return replace(shape, adapters=parameters(table, targets), adapted=count)
    blocks = shape.parameters - (shape.outside_blocks or shape.vocab_size * shape.hidden_size)
    number = 7 * max(1, shape.layers)
    adapters = int(number * table.rank * 2 * max(1.0, blocks / number) ** 0.5)
    return replace(shape, adapters=adapters, adapted=blocks)


def last_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `up_proj`."""
    return name.removesuffix(_WEIGHT).rpartition(".")[2]


def _fits(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")
