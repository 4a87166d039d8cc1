"""Qwen3: a dense decoder with a norm on every query and key head; tied embeddings in the small ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.models.adapter import MemoryShape, ModelAdapter, WireTensor
from astracli.models.adapter_tools import Shapes, dense_memory_shape, dense_shapes, load_checkpoint, wire_map


def _shapes(config: Mapping[str, Any]) -> Shapes:
    return dense_shapes(config, head_dim=128, head_norms=True)


def load(path: Path, *, attention: str = "sdpa") -> Any:
    """Qwen3ForCausalLM in fp32. Raises UserError naming tensors that the checkpoint lacks or has too many."""
    from transformers import Qwen3ForCausalLM

    return load_checkpoint(Qwen3ForCausalLM, path, attention=attention)


def memory_shape(config: Mapping[str, Any]) -> MemoryShape:
    return dense_memory_shape(config, _shapes(config))


def wire_tensors(model: Any) -> dict[str, WireTensor]:
    return wire_map(model, _shapes(model.config.to_dict()))


def prepare_gpu(model: Any) -> None:
    from astracli.kernels.gpu import fused

    fused.install(model, norms=("Qwen3RMSNorm",), mlps=("Qwen3MLP",))


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


_QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_QWEN3_8B = _QWEN3_1_7B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}

ADAPTER = ModelAdapter(
    name="qwen3",
    model_types=("qwen3",),
    summary="Qwen3 dense models (0.6B to 32B)",
    load_for_training=load,
    load_for_serving=load,
    memory_shape=memory_shape,
    wire_tensors=wire_tensors,
    prepare_gpu=prepare_gpu,
    known_configs={"Qwen/Qwen3-1.7B": _QWEN3_1_7B, "Qwen/Qwen3-8B": _QWEN3_8B},
    shapes=_shapes,
    tiny_config=tiny_config,
)
