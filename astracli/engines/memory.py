"""What an engine holds in memory, in bytes, counted from the model's sizes and the recipe. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from astracli.machine.memory import CUDA_CONTEXT, TORCH_PROCESS, Component, MemoryRow, Place

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.models.adapter import MemoryShape


class MemoryModel:
    """An engine in plain torch: fp32 parameters, a copy of them as published, an fp32 cache that grows with use."""

    weight_bytes = 6
    """Of one parameter."""
    cache_factor = 2
    """Bytes of its KV cache over those of one in bf16."""
    spare_states = 0
    """Recurrent states that it holds besides those of the requests that it serves."""
    cached_states = 1
    """Recurrent states that a request takes with a prefix cache."""
    stays = CUDA_CONTEXT
    """What it keeps of its GPU while a trainer uses that in time sharing."""

    def share(self, recipe: Recipe) -> float:
        """Part of its GPU that it may reserve for weights, recurrent state and KV cache."""
        return 0.8

    def cache(self, shape: MemoryShape, recipe: Recipe) -> int:
        """The KV cache of one request of full context."""
        return self.cache_factor * shape.kv_bytes_per_token * recipe.rollout.context_length

    def reserved(self, shape: MemoryShape, recipe: Recipe, *, requests: int = 1) -> int:
        """What it must reserve on a GPU: weights, every state, and the KV cache of `requests` full contexts."""
        states = (recipe.rollout.running * self.states(recipe) + self.spare_states) * shape.state_bytes_per_sequence
        return self.weight_bytes * shape.parameters + states + requests * self.cache(shape, recipe)

    def states(self, recipe: Recipe) -> int:
        """Recurrent states of one request. A hybrid's prefix cache is there only when the recipe asks for it."""
        return self.cached_states if recipe.rollout.prefix_cache == "on" else 1

    def beside(self, shape: MemoryShape, recipe: Recipe) -> int:
        """What it takes of a GPU besides what it reserves."""
        return CUDA_CONTEXT

    def rows(
        self, name: str, shape: MemoryShape, recipe: Recipe, device: str, *, reserved: int | None = None
    ) -> list[MemoryRow]:
        """The process `name`, at `max_running_requests` sequences of full context. `reserved`: bytes that it reserves
        of its GPU; None when that is not known."""
        requests = recipe.rollout.running
        where: Place = "gpu" if device == "cuda" else "host"
        rows = [
            MemoryRow(name, Component.WEIGHTS_FP32, where, 4 * shape.parameters),
            MemoryRow(name, Component.WEIGHTS_AS_PUBLISHED, where, 2 * shape.parameters),
            MemoryRow(name, Component.KV_CACHE_FP32, where, requests * self.cache(shape, recipe), fixed=False),
        ]
        if shape.state_bytes_per_sequence:
            state = shape.state_bytes_per_sequence * requests
            rows.append(MemoryRow(name, Component.RECURRENT_STATE, where, state, fixed=False))
        if device == "cuda":
            rows.append(MemoryRow(name, Component.CUDA_CONTEXT, "gpu", CUDA_CONTEXT, "estimated"))
        return [*rows, MemoryRow(name, Component.PROCESS, "host", TORCH_PROCESS, "estimated")]

    def smaller(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        """Settings of the engine's own (dotted key -> value) that need less memory and change no sample, in order."""
        return iter(())
