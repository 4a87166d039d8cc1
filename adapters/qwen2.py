"""Qwen2 and Qwen2.5: dense decoders with a bias on queries, keys and values alone; tied embeddings up to 3B.

Where a turn ends is the checkpoint's business (generation_config.json): the base models end at `<|endoftext|>`, the
instruct models at `<|im_end|>` as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from astracli.adapters.dense import dense_adapter
from astracli.models.adapter_tools import dense_shapes


def _published(size: str, **config: Any) -> dict[str, dict[str, Any]]:
    """Hub ids of one size -> its config.json (huggingface.co/Qwen/Qwen2.5-{size}/blob/main/config.json): Qwen2.5,
    its instruct model, and the coder's two have the same shapes."""
    shapes = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True} | config
    names = [f"Qwen/Qwen2.5-{kind}{size}{tuned}" for kind in ("", "Coder-") for tuned in ("", "-Instruct")]
    return dict.fromkeys(names, shapes)


KNOWN = {
    **_published(
        "0.5B",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    **_published(
        "1.5B",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    **_published(
        "3B",
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    **_published(
        "7B",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}

ADAPTER = dense_adapter(
    "Qwen2",
    partial(dense_shapes, head_dim=None, head_norms=False, biases=("q_proj", "k_proj", "v_proj")),
    {"model_type": "qwen2", "tie_word_embeddings": True},
    name="qwen2",
    model_types=("qwen2",),
    summary="Qwen2 and Qwen2.5 dense models (0.5B to 72B)",
    known_configs=KNOWN,
)
