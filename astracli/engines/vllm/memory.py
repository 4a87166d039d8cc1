"""What a vLLM server holds. Not yet compared with a running one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from astracli.engines.memory import MemoryModel
from astracli.engines.vllm.settings import own
from astracli.machine.memory import CUDA_CONTEXT, TORCH_PROCESS, Component, MemoryRow

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.models.adapter import MemoryShape

CUDA_GRAPHS = 2**30
"""What its captured graphs hold (estimated)."""
SAMPLING_BUFFERS = 5
"""fp32 arrays of [requests, vocabulary] that sampling holds at once (estimated)."""


class VllmMemory(MemoryModel):
    weight_bytes = 2
    cache_factor = 1
    cached_states = 2
    """The one that it goes on from and the one that it writes (`MambaManager`, mode `align`, in
    `v1/core/single_type_kv_cache_manager.py`); what it keeps besides gives way."""
    stays = CUDA_GRAPHS + CUDA_CONTEXT

    def share(self, recipe: Recipe) -> float:
        return own(recipe).gpu_memory_utilization

    def beside(self, shape: MemoryShape, recipe: Recipe) -> int:
        """vLLM measures a step's activations at its start and reserves them within its share: graphs come on top."""
        return self.stays

    def rows(
        self, name: str, shape: MemoryShape, recipe: Recipe, device: str, *, reserved: int | None = None
    ) -> list[MemoryRow]:
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
            states = shape.state_bytes_per_sequence * requests * self.states(recipe)
            rows.append(MemoryRow(name, Component.RECURRENT_STATE, "gpu", states))
        chunk = min(own(recipe).max_num_batched_tokens, requests * recipe.rollout.context_length)
        logits = SAMPLING_BUFFERS * 4 * shape.vocab_size * requests
        return [
            *rows,
            MemoryRow(name, Component.PREFILL, "gpu", chunk * max(shape.kept_of_blocks) // 2, "estimated"),
            MemoryRow(name, Component.DECODE_LOGITS, "gpu", logits, "estimated"),
            MemoryRow(name, Component.CUDA_GRAPHS, "gpu", CUDA_GRAPHS, "estimated"),
            MemoryRow(name, Component.CUDA_CONTEXT, "gpu", CUDA_CONTEXT, "estimated"),
            MemoryRow(name, Component.STAGED_WEIGHTS, "host", weights, "estimated", fixed=False),
            MemoryRow(name, Component.PROCESS, "host", TORCH_PROCESS, "estimated"),
        ]

    def smaller(self, recipe: Recipe) -> Iterator[dict[str, Any]]:
        table = own(recipe)
        if table.max_num_batched_tokens > 2048:
            yield {"rollout.vllm.max_num_batched_tokens": 2048}
        for value in (0.8, 0.85, 0.9):
            if value > table.gpu_memory_utilization:
                yield {"rollout.vllm.gpu_memory_utilization": value}
