"""Llama: a dense decoder; untied output head in the 8B, biases off unless the config says so."""

from __future__ import annotations

from functools import partial

from astracli.adapters.dense import dense_adapter
from astracli.models.adapter_tools import dense_shapes

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

ADAPTER = dense_adapter(
    "Llama",
    partial(dense_shapes, head_dim=None, head_norms=False),
    {"model_type": "llama", "tie_word_embeddings": False, "bos_token_id": 2},
    name="llama",
    model_types=("llama",),
    summary="Llama 3 and models of its shape (dense)",
    known_configs={"meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B, "meta-llama/Llama-3.1-8B-Instruct": LLAMA3_8B},
)
