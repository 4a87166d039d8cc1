"""Qwen3: a dense decoder with a norm on every query and key head; tied embeddings in the small ones."""

from __future__ import annotations

from functools import partial

from astracli.adapters.dense import dense_adapter
from astracli.models.adapter_tools import dense_shapes

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

ADAPTER = dense_adapter(
    "Qwen3",
    partial(dense_shapes, head_dim=128, head_norms=True),
    {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    name="qwen3",
    model_types=("qwen3",),
    summary="Qwen3 dense models (0.6B to 32B)",
    known_configs={"Qwen/Qwen3-1.7B": _QWEN3_1_7B, "Qwen/Qwen3-8B": _QWEN3_8B},
)
