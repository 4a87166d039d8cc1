"""How Qwen3.5's layers are computed in training where transformers' own forward is wrong or slow.

A Gated DeltaNet carries state through a row twice: the convolution over its last tokens, and the delta rule. In a
packed row both begin anew at every boundary of `cu_seqlens`. The kernels are chosen by the device of the tensor, never
by what is installed: fla's Triton kernels on a GPU, torch on a CPU, where an installed fla would ask for a driver.

Shape letters: T tokens of a row, C channels of the convolution, J its taps, H heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

CHUNK = 64
"""Tokens that the torch delta rule takes at once."""

_DISPATCHED = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)


def delta_net_modules(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "A_log") and hasattr(m, "in_proj_qkv")]


@lru_cache
def fla() -> Any:
    """fla's kernels where they run; None without fla or without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        from fla.modules.activations import swiglu_linear
        from fla.modules.fused_norm_gate import rms_norm_gated
        from fla.modules.layernorm import rms_norm
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    try:  # 0.6 and later
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError:
        from fla.modules.convolution import causal_conv1d
    return SimpleNamespace(
        swiglu_linear=swiglu_linear,
        rms_norm=rms_norm,
        rms_norm_gated=rms_norm_gated,
        rule=chunk_gated_delta_rule,
        conv=causal_conv1d,
    )


def _apart(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A kernel whose host code remembers what it computed for the last boundaries. Selective recomputation compares the
    operators of both passes one by one and must not see that the second pass has fewer, or more."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return kernel(*args, **kwargs)


def torch_rule() -> Callable[..., Any]:
    """transformers' chunk rule in torch; newer releases wrap it so that it calls fla where fla is installed."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    from astracli.cpu import delta_rule

    return partial(delta_rule.rule, inspect.unwrap(modeling.torch_chunk_gated_delta_rule), CHUNK)


def torch_on_cpu() -> None:
    """Newer transformers call fla wherever it is installed: let those functions look at the tensor's device first."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    for name in _DISPATCHED:
        wrapped: Any = getattr(modeling, name, None)
        inner = wrapped and inspect.unwrap(wrapped)
        if inner is not wrapped and getattr(wrapped, "func", None) is not _by_device:
            chooser: Any = partial(_by_device, wrapped, inner)
            chooser.__wrapped__ = inner
            setattr(modeling, name, chooser)


def _by_device(on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    if x.is_cuda:
        return on_gpu(x, *args, **kwargs)
    known = inspect.signature(on_cpu).parameters
    return on_cpu(x, *args, **{name: value for name, value in kwargs.items() if name in known})


def install_varlen(model: Any) -> None:
    """Exact packed rows: every Gated DeltaNet gets a forward that knows `cu_seqlens`."""
    for module in delta_net_modules(model):
        if getattr(module.forward, "func", None) is not delta_net:
            module.forward = partial(delta_net, module, module.forward)


def delta_net(
    module: Any,
    plain: Callable[..., Any],
    hidden_states: Any,
    cache_params: Any = None,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Any:
    """[B, T, hidden] -> [B, T, hidden]; with `cu_seqlens` (int32 [S + 1]) B is 1 and every segment starts from zeros.

    What training never asks for (a cache, a mask) goes to transformers' own forward, `plain`, and so does an ordinary
    row on a CPU. Raises ValueError when the boundaries do not cover the row.
    """
    import torch

    kernels = fla() if hidden_states.is_cuda else None
    if cache_params is not None or attention_mask is not None or (cu_seqlens is None and kernels is None):
        if cu_seqlens is not None:
            raise ValueError("a packed row takes no cache and no mask")
        return plain(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    rows, tokens = hidden_states.shape[:2]
    if cu_seqlens is not None and rows != 1:
        raise ValueError(f"cu_seqlens with {rows} rows; a packed row is one")
    mixed = module.in_proj_qkv(hidden_states)
    taps = module.conv1d.weight.squeeze(1)
    bounds = _segments(cu_seqlens, tokens) if kernels is None else []
    if kernels is not None:
        mixed = _apart(kernels.conv, mixed, taps, module.conv1d.bias, activation="silu", cu_seqlens=cu_seqlens)[0]
    else:
        mixed = torch.cat([_torch_conv(mixed[:, a:b], taps, module.conv1d.bias) for a, b in bounds], dim=1)
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    query, key = (x.reshape(rows, tokens, -1, module.head_k_dim) for x in (query, key))
    value = value.reshape(rows, tokens, -1, module.head_v_dim)
    if (times := module.num_v_heads // module.num_k_heads) > 1:
        query, key = query.repeat_interleave(times, dim=2), key.repeat_interleave(times, dim=2)
    beta = module.in_proj_b(hidden_states).sigmoid()
    decay = module.in_proj_a(hidden_states).float() + module.dt_bias.float()
    g = -module.A_log.float().exp() * torch.nn.functional.softplus(decay)
    gate = module.in_proj_z(hidden_states).reshape(rows, tokens, -1, module.head_v_dim)
    if kernels is not None:
        options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
        out = _apart(kernels.rule, query, key, value, g=g, beta=beta, **options)[0]
        out = kernels.rms_norm_gated(out, gate, module.norm.weight, None, eps=module.layer_norm_epsilon)
    else:
        rule = partial(torch_rule(), use_qk_l2norm_in_kernel=True)
        parts = [tuple(x[:, a:b] for x in (query, key, value, g, beta)) for a, b in bounds]
        out = torch.cat([rule(q, k, v, g=g_, beta=beta_)[0] for q, k, v, g_, beta_ in parts], dim=1)
        out = module.norm(out.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return module.out_proj(out.reshape(rows, tokens, -1))


def _segments(cu_seqlens: Any, tokens: int) -> list[tuple[int, int]]:
    from astracli.training.varlen import segments

    return segments(cu_seqlens, tokens)


def _torch_conv(x: Any, taps: Any, bias: Any) -> Any:
    """silu of the causal depthwise convolution: x [B, T, C], taps [C, J] -> [B, T, C], from zeros."""
    from astracli.cpu import delta_rule

    return delta_rule.conv_silu(x.transpose(1, 2), taps, bias).transpose(1, 2)


def prepare_gpu(model: Any) -> None:
    """Every layer through fla's kernels where it is installed; in eager torch a norm is six kernels in fp32."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    if fla() is None:
        return
    install_varlen(model)
    own: dict[type, Any] = {modeling.Qwen3_5RMSNorm: _norm, modeling.Qwen3_5MLP: _mlp}
    for module in model.modules():
        if (forward := own.get(type(module))) is not None:
            module.forward = partial(forward, module)


def _norm(module: Any, x: Any) -> Any:
    """The weight is centred at zero; 1 + weight in fp32, as engines compute it."""
    return fla().rms_norm(x, 1.0 + module.weight.float(), None, eps=module.eps)


def _mlp(module: Any, x: Any) -> Any:
    """down(silu(gate) * up); the product is not kept but made again in the backward pass."""
    return fla().swiglu_linear(module.gate_proj(x), module.up_proj(x), module.down_proj.weight, module.down_proj.bias)
