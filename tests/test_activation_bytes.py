"""The adapters' figure for what autograd keeps of a block is what it keeps: counted on a model without memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from astracli.adapters import generic, llama, qwen2, qwen3, qwen3_5
from astracli.kernels.gpu import fused

TOKENS = 512


class Keeps(torch.autograd.Function):
    """A fused kernel: gives something of `like`'s shape and keeps `kept`."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return torch.empty_like(like)


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """[B, H, T, D]; keeps its inputs, its output (in the order of the tokens) and a normaliser a head and token."""
    out = query.new_empty(query.transpose(1, 2).shape)

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(query, key, value, out, fp32(*query.shape[:3]))
            return out.transpose(1, 2)

    return Flash.apply(query, key, value)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU: the layers then take fla's kernels."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def fla() -> Any:
    """fla's kernels: what their autograd functions save (its ops/gated_delta_rule/chunk.py and modules)."""

    def rule(query: Any, key: Any, value: Any, *, g: Any, beta: Any, **_: Any) -> tuple[Any, None]:
        heads = query.shape[:3]
        copies = (query.clone(), fp32(*heads), key.clone(), fp32(*heads), value.contiguous(), g.clone())
        return Keeps.apply(value, *copies, beta, value.new_empty(*heads, 64)), None

    def norm(x: Any, *rest: Any, eps: float) -> Any:
        rows = x.contiguous()
        return Keeps.apply(rows, rows, *(t for t in rest if t is not None), fp32(*x.shape[:-1]))

    def swiglu_linear(gate: Any, up: Any, weight: Any, bias: Any) -> Any:
        return Keeps.apply(gate.new_empty(*gate.shape[:-1], len(weight)), gate, up, weight)

    return SimpleNamespace(
        rule=rule,
        conv=lambda x, weight, bias, **_: (Keeps.apply(x, x, weight), None),
        rms_norm=norm,
        rms_norm_gated=norm,
        swiglu_linear=swiglu_linear,
    )


def kept_bytes(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> int:
    """Bytes of the distinct storages that a forward of `layer` saves, parameters and rotary tables aside."""
    inputs = {t.untyped_storage()._cdata for t in (*layer.parameters(), cos, sin)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, attention_mask=None, position_embeddings=(cos, sin), position_ids=torch.arange(TOKENS)[None])
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in inputs)


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (qwen3_5, "Qwen/Qwen3.5-4B"),
        (qwen3_5, "Qwen/Qwen3.5-0.8B"),
        (qwen3, "Qwen/Qwen3-1.7B"),
        (qwen2, "Qwen/Qwen2.5-0.5B"),
        (llama, "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_a_block_keeps_what_its_adapter_says(adapter: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(fused, "fla", fla)
    document = dict(adapter.ADAPTER.known_configs[name])
    shape = adapter.ADAPTER.memory_shape(document)
    text = dict(document.get("text_config", document), num_hidden_layers=4)
    kind = {"qwen3_5": "qwen3_5_text"}.get(document["model_type"], document["model_type"])
    text.pop("model_type", None)
    config = AutoConfig.for_model(kind, **text)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        hidden = torch.empty(1, TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = (torch.empty(1, TOKENS, shape_of(config), dtype=torch.bfloat16) for _ in range(2))
    if adapter.ADAPTER.hybrid:  # a dense model is planned without fla's kernels, which keep about half as much
        assert adapter.ADAPTER.prepare_gpu is not None
        adapter.ADAPTER.prepare_gpu(model)
        hidden = hidden.detach().as_subclass(OnGpu).requires_grad_()
    for index, layer in enumerate(model.model.layers):
        counted = kept_bytes(layer, hidden, cos, sin) / TOKENS
        assert shape.block_activations[index] == pytest.approx(counted, rel=0.01), (index, counted)


def shape_of(config: Any) -> int:
    """Channels that the rotary embedding turns."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def test_what_lies_outside_the_blocks() -> None:
    tied = qwen3_5.ADAPTER.memory_shape(qwen3_5.ADAPTER.known_configs["Qwen/Qwen3.5-4B"])
    assert tied.outside_blocks == 248320 * 2560 + 2560
    untied = llama.ADAPTER.memory_shape(llama.LLAMA3_8B)
    assert untied.outside_blocks == 2 * 128256 * 4096 + 4096
    assert generic.memory_shape(llama.ADAPTER.tiny_config()).outside_blocks == 2 * 64 * 32 + 32
