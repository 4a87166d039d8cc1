"""Qwen3.5 by its config.json alone: shapes, bytes of states and activations, and the configs that are known.

Nothing here imports torch: a plan asks for sizes before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from astracli.adapters import qwen3_5_layers as layers
from astracli.models.adapter import MemoryShape
from astracli.models.adapter_tools import Shapes, gemm_flops, outside_blocks


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a config.json, whichever layout; `tie_word_embeddings` may stand at either level."""
    text = dict(config.get("text_config") or config)
    text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return text


def layer_types(text: Mapping[str, Any]) -> list[str]:
    interval = text.get("full_attention_interval", 4)
    count = text["num_hidden_layers"]
    return text.get("layer_types") or [
        "linear_attention" if (index + 1) % interval else "full_attention" for index in range(count)
    ]


def delta_net_sizes(text: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """(key heads, value heads, key head dim, value head dim, convolution kernel)"""
    return (
        text.get("linear_num_key_heads", 16),
        text.get("linear_num_value_heads", 32),
        text.get("linear_key_head_dim", 128),
        text.get("linear_value_head_dim", 128),
        text.get("linear_conv_kernel_dim", 4),
    )


def _full_attention(text: Mapping[str, Any]) -> Shapes:
    hidden, dim = text["hidden_size"], text.get("head_dim", 256)
    query, kv = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
    shapes: Shapes = {
        "self_attn.q_proj.weight": (2 * query, hidden),  # query and output gate
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
    }
    if text.get("attention_bias"):
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes | {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}


def _delta_net(text: Mapping[str, Any]) -> Shapes:
    hidden = text["hidden_size"]
    key_heads, value_heads, key_dim, value_dim, kernel = delta_net_sizes(text)
    keys, values = key_heads * key_dim, value_heads * value_dim
    return {
        "linear_attn.A_log": (value_heads,),
        "linear_attn.dt_bias": (value_heads,),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, kernel),
        "linear_attn.norm.weight": (value_dim,),
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (value_heads, hidden),
        "linear_attn.in_proj_a.weight": (value_heads, hidden),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def text_shapes(config: Mapping[str, Any]) -> Shapes:
    """`{HF text name: shape}` of everything that is trained."""
    text = text_config(config)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    common: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    mixers = {"linear_attention": _delta_net(text), "full_attention": _full_attention(text)}
    shapes: Shapes = {"model.embed_tokens.weight": (text["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index, kind in enumerate(layer_types(text)):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in (common | mixers[kind]).items()}
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def memory_shape(config: Mapping[str, Any]) -> MemoryShape:
    """Recurrent state in fp32, convolution state (kernel - 1 columns) and KV cache in bf16."""
    text, shapes = text_config(config), text_shapes(config)
    kinds, sizes = layer_types(text), _activations(text)
    key_heads, value_heads, key_dim, value_dim, kernel = delta_net_sizes(text)
    recurrent = value_heads * key_dim * value_dim * 4
    convolution = (2 * key_heads * key_dim + value_heads * value_dim) * (kernel - 1) * 2
    kv_width = text["num_key_value_heads"] * text.get("head_dim", 256)
    return MemoryShape(
        parameters=sum(prod(shape) for shape in shapes.values()),
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        layers=text["num_hidden_layers"],
        kv_bytes_per_token=kinds.count("full_attention") * 2 * 2 * kv_width,
        state_bytes_per_sequence=kinds.count("linear_attention") * (recurrent + convolution),
        flops_per_token=gemm_flops(shapes, tied=text["tie_word_embeddings"]),
        outside_blocks=outside_blocks(shapes),
        block_activations=tuple(sizes[kind] for kind in kinds),
    )


def _activations(text: Mapping[str, Any]) -> dict[str, int]:
    """Kind of block -> bytes a token in bf16 that autograd keeps of it on a GPU.

    fla's norms keep input and output (2 + 2 bytes a unit), its MLP gate and up (2 + 2). Full attention: normed heads'
    inputs, what varlen attention keeps (query, key, value, output), the gate and the gated output. Delta rule: input of
    the convolution; query and key, normed and repeated to the value heads, value, gate, output, gated output; a row of
    the chunk's matrix a head.
    """
    key_heads, value_heads, key_dim, value_dim, _ = delta_net_sizes(text)
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    query, kv = (text[f"num_{n}_heads"] * text.get("head_dim", 256) for n in ("attention", "key_value"))
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    block = 2 * 4 * hidden + 4 * inner
    delta = 2 * channels + 4 * value_heads * key_dim + 8 * values + (2 * layers.CHUNK + 26) * value_heads
    return {
        "linear_attention": block + delta,
        "full_attention": block + 10 * query + 6 * kv + 4 * heads,
    }


def interval(text: Mapping[str, Any]) -> int:
    """Every n-th layer is full attention."""
    return layer_types(text).index("full_attention") + 1


TEXT_4B: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "tie_word_embeddings": True,
}
TEXT_0_8B = TEXT_4B | {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 16,
}
