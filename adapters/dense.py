"""What dense families of Llama's shape share: their adapters differ in names and sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from astracli.models.adapter import ModelAdapter
from astracli.models.adapter_tools import DENSE_PROJECTIONS, Shapes, dense_memory_shape, load_checkpoint, wire_map


def dense_adapter(
    family: str, shapes: Callable[[Mapping[str, Any]], Shapes], tiny: dict[str, Any], **own: Any
) -> ModelAdapter:
    """`family`: what the names of its classes in transformers begin with. `shapes`: config.json -> HF name -> shape.
    `tiny`: what its smallest config.json says beside what all say. `own`: the other fields of the adapter."""

    def load(path: Path, *, attention: str = "sdpa") -> Any:
        """In fp32. Raises UserError naming tensors that the checkpoint lacks or has too many."""
        import transformers

        return load_checkpoint(getattr(transformers, f"{family}ForCausalLM"), path, attention=attention)

    def prepare_gpu(model: Any) -> None:
        from astracli.kernels.gpu import fused

        fused.install(model, norms=(f"{family}RMSNorm",), mlps=(f"{family}MLP",))

    def tiny_config() -> dict[str, Any]:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return {"architectures": [f"{family}ForCausalLM"], "pad_token_id": 0, "eos_token_id": 1} | sizes | layers | tiny

    return ModelAdapter(
        load_for_training=load,
        load_for_serving=load,
        memory_shape=lambda config: dense_memory_shape(config, shapes(config)),
        wire_tensors=lambda model: wire_map(model, shapes(model.config.to_dict())),
        prepare_gpu=prepare_gpu,
        shapes=shapes,
        lora_targets=DENSE_PROJECTIONS,
        shares_prompts=True,
        tiny_config=tiny_config,
        **own,
    )
