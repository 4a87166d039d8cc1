"""Llama: a dense decoder; untied output head in the 8B, biases off unless the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astracli.models.adapter import MemoryShape, ModelAdapter, WireTensor
from astracli.models.adapter_tools import Shapes, dense_memory_shape, dense_shapes, load_checkpoint, wire_map


def _shapes(config: Mapping[str, Any]) -> Shapes:
    return dense_shapes(config, head_dim=None, head_norms=False)


def load(path: Path, *, attention: str = "sdpa") -> Any:
    """LlamaForCausalLM in fp32. Raises UserError naming tensors that the checkpoint lacks or has too many."""
    from transformers import LlamaForCausalLM

    return load_checkpoint(LlamaForCausalLM, path, attention=attention)


def memory_shape(config: Mapping[str, Any]) -> MemoryShape:
    return dense_memory_shape(config, _shapes(config))


def wire_tensors(model: Any) -> dict[str, WireTensor]:
    return wire_map(model, _shapes(model.config.to_dict()))


def prepare_gpu(model: Any) -> None:
    from astracli.kernels.gpu import fused

    fused.install(model, norms=("LlamaRMSNorm",), mlps=("LlamaMLP",))


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}

ADAPTER = ModelAdapter(
    name="llama",
    model_types=("llama",),
    summary="Llama 3 and models of its shape (dense)",
    load_for_training=load,
    load_for_serving=load,
    memory_shape=memory_shape,
    wire_tensors=wire_tensors,
    prepare_gpu=prepare_gpu,
    known_configs={"meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B, "meta-llama/Llama-3.1-8B-Instruct": LLAMA3_8B},
    shapes=_shapes,
    tiny_config=tiny_config,
)
