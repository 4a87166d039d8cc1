"""What an SGLang server holds: on a GPU a pool that it reserves at its start, and buffers beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from astracli.engines.memory import MemoryModel
from astracli.engines.sglang.settings import own
from astracli.machine.memory import CUDA_CONTEXT, TORCH_PROCESS, Component, MemoryRow

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.models.adapter import MemoryShape

CUDA_GRAPHS = 2**30
"""What an engine's captured decode graphs hold (estimated)."""
SAMPLING_BUFFERS = 5
"""fp32 arrays of [requests, vocabulary] that sampling holds at once (estimated)."""
STAGED_BYTES = 6 * 0.05
"""An index and a value for each of one parameter in twenty: a delta that waits on the GPU for its pause. What finds no
room there waits in pinned memory."""


class SglangMemory(MemoryModel):
    weight_bytes = 2
    cache_factor = 1
    spare_states = 1
    """It holds one slot more than it serves."""
    cached_states = 3
    """Of its strategy `no_buffer` (0.5.17: `_calculate_mamba_ratio` in `mem_cache/kv_cache_configurator.py`)."""
    stays = CUDA_GRAPHS + CUDA_CONTEXT

    def share(self, recipe: Recipe) -> float:
        return own(recipe).mem_fraction_static

    def beside(self, shape: MemoryShape, recipe: Recipe) -> int:
        return self._prefill(shape, recipe) + self._sampling(shape, recipe) + self.stays

    def rows(
        self, name: str, shape: MemoryShape, recipe: Recipe, device: str, *, reserved: int | None = None
    ) -> list[MemoryRow]:
        """With `reserved` the KV cache is what the others leave of it, at least one request of full context."""
        if device == "cpu":
            return MemoryModel().rows(name, shape, recipe, device)
        one, requests, weights = self.cache(shape, recipe), recipe.rollout.running, 2 * shape.parameters
        pool = one * requests
        if reserved is not None:
            pool = min(pool, max(one, reserved - self.reserved(shape, recipe, requests=0)))
        rows = [
            MemoryRow(name, Component.WEIGHTS, "gpu", weights),
            MemoryRow(name, Component.KV_CACHE_OF_ONE, "gpu", one),
            MemoryRow(name, Component.KV_CACHE_OF_OTHERS, "gpu", pool - one, fixed=reserved is not None),
        ]
        if shape.state_bytes_per_sequence:
            states = shape.state_bytes_per_sequence * (requests * self.states(recipe) + self.spare_states)
            rows.append(MemoryRow(name, Component.RECURRENT_STATE, "gpu", states))
        staged = 0 if recipe.weights.transfer == "adapter" else int(STAGED_BYTES * shape.parameters)
        return [
            *rows,
            MemoryRow(name, Component.PREFILL, "gpu", self._prefill(shape, recipe), "estimated"),
            MemoryRow(name, Component.DECODE_LOGITS, "gpu", self._sampling(shape, recipe), "estimated"),
            MemoryRow(name, Component.CUDA_GRAPHS, "gpu", CUDA_GRAPHS, "estimated"),
            MemoryRow(name, Component.CUDA_CONTEXT, "gpu", CUDA_CONTEXT, "estimated"),
            MemoryRow(name, Component.STAGED_WEIGHTS, "host", weights, "estimated", fixed=False),
            MemoryRow(name, Component.STAGED_CHANGES, "gpu", staged, "estimated", fixed=False),
            MemoryRow(name, Component.PROCESS, "host", TORCH_PROCESS, "estimated"),
        ]

    def smaller(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        table = own(recipe)
        if table.chunked_prefill_size > 2048:
            yield {"rollout.sglang.chunked_prefill_size": 2048}
        for value in (0.8, 0.85, 0.9):
            if value > table.mem_fraction_static:
                yield {"rollout.sglang.mem_fraction_static": value}

    def _prefill(self, shape: MemoryShape, recipe: Recipe) -> int:
        """Without gradients about half of what autograd would keep of one block lives at once."""
        chunk = min(own(recipe).chunked_prefill_size, recipe.rollout.running * recipe.rollout.context_length)
        return chunk * max(shape.kept_of_blocks) // 2

    def _sampling(self, shape: MemoryShape, recipe: Recipe) -> int:
        return SAMPLING_BUFFERS * 4 * shape.vocab_size * recipe.rollout.running
