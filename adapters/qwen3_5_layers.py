"""How Qwen3.5's layers are computed in training where transformers' own forward is wrong or slow.

A Gated DeltaNet carries state through a row twice: the convolution over its last tokens, and the delta rule. In a
packed row both begin anew at every boundary of `cu_seqlens`. The kernels are chosen by the device of the tensor, never
by what is installed: fla's Triton kernels on a GPU, torch on a CPU, where an installed fla would ask for a driver.

Shape letters: T tokens of a row, C channels of the convolution, J its taps, H heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

CHUNK = 64
"""Tokens that the torch delta rule takes at once."""

_DISPATCHED = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)

_BOUNDARIES = ("cu_seqlens", "cu_seqlens_host", "carry_state", "shared_prompts")


def delta_net_modules(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "A_log") and hasattr(m, "in_proj_qkv")]


def torch_rule() -> Callable[..., Any]:
    """transformers' chunk rule in torch; newer releases wrap it so that it calls fla where fla is installed."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    from astracli.kernels.cpu import delta_rule

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


def _by_device(on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """By the first argument, a tensor, given by its place or by name."""
    if next(iter((*args, *kwargs.values()))).is_cuda:
        return on_gpu(*args, **kwargs)
    known = inspect.signature(on_cpu).parameters
    return on_cpu(*args, **{name: value for name, value in kwargs.items() if name in known})


def install_varlen(model: Any, *, all_rows: bool = False) -> None:
    """Exact packed rows: every Gated DeltaNet gets a forward that knows `cu_seqlens`. `all_rows`: ordinary rows on a
    CPU take it too, for a transformers whose layers cannot be given kernels."""
    for module in delta_net_modules(model):
        if getattr(module.forward, "func", None) is not delta_net:
            module.forward = partial(delta_net, module, module.forward, all_rows)
    for layer in model.modules():
        if _hands_nothing_on(layer) and not hasattr(layer.linear_attn, "boundaries"):
            layer.linear_attn.boundaries = {}
            layer.register_forward_pre_hook(_remember, with_kwargs=True)


def _hands_nothing_on(layer: Any) -> bool:
    """transformers 5.8 calls a Gated DeltaNet without the keyword arguments of its layer; later ones hand them on."""
    if not hasattr(layer, "linear_attn"):
        return False
    parameters = inspect.signature(type(layer.linear_attn).forward).parameters.values()
    return all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _remember(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before every forward of the layer, also one that a backward pass repeats."""
    layer.linear_attn.boundaries = {name: kwargs[name] for name in _BOUNDARIES if name in kwargs}


def delta_net(
    module: Any,
    plain: Callable[..., Any],
    all_rows: bool,
    hidden_states: Any,
    cache_params: Any = None,
    attention_mask: Any = None,
    cache: Any = None,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    cu_seqlens_host: tuple[int, ...] | None = None,
    carry_state: bool = False,
    shared_prompts: Any = None,
    **kwargs: Any,
) -> Any:
    """[B, T, hidden] -> [B, T, hidden]; with `cu_seqlens` (int32 [S + 1]) B is 1 and every segment starts from zeros,
    unless `carry_state` (an ablation) treats the row as one segment. With `shared_prompts` (a `SharedRow`) samples go
    on from their prompt.

    What training never asks for (a cache, `cache_params` until transformers 5.23; a mask) goes to transformers' own
    forward, `plain`, and so does an ordinary row on a CPU without `all_rows`. Raises ValueError when the boundaries do
    not cover the row.
    """
    import torch

    from astracli.adapters import qwen3_5_shared as shared
    from astracli.kernels.cpu.delta_rule import conv_silu
    from astracli.kernels.gpu import fused
    from astracli.kernels.varlen import segments
    from astracli.kernels.weight_gradients import linears

    if told := getattr(module, "boundaries", None):
        cu_seqlens, cu_seqlens_host = told.get("cu_seqlens"), told.get("cu_seqlens_host")
        carry_state, shared_prompts = told.get("carry_state", False), told.get("shared_prompts")
    if carry_state:
        cu_seqlens = cu_seqlens_host = None
    kernels = fused.fla() if hidden_states.is_cuda else None
    ordinary = cu_seqlens is None and kernels is None and not all_rows
    caches = {"cache_params": cache_params, "cache": cache}
    held = {name: given for name, given in caches.items() if given is not None}
    if held or attention_mask is not None or ordinary:
        if cu_seqlens is not None:
            raise ValueError("a packed row takes no cache and no mask")
        return plain(hidden_states, attention_mask=attention_mask, **held, **kwargs)
    rows, tokens = hidden_states.shape[:2]
    if cu_seqlens is not None and rows != 1:
        raise ValueError(f"cu_seqlens with {rows} rows; a packed row is one")
    projections = module.in_proj_qkv, module.in_proj_b, module.in_proj_a, module.in_proj_z
    mixed, beta, decay, gate = linears(hidden_states, projections)
    by_torch = kernels is None or fused.delta_rule_by_torch
    bounds = segments(cu_seqlens, tokens, cu_seqlens_host) if by_torch else []
    known = {}
    if kernels and cu_seqlens is not None and cu_seqlens_host:
        known = fused.chunks(cu_seqlens_host, hidden_states.device)
    taps, bias = module.conv1d.weight.squeeze(1), module.conv1d.bias
    conv = partial(kernels.conv, cu_seqlens=cu_seqlens, **known) if kernels is not None else None
    if shared_prompts is not None:
        mixed = shared.convolution(mixed, taps, bias, shared_prompts, conv)
    elif conv is not None:
        mixed = conv(mixed, taps, bias, activation="silu")[0]
    else:
        turned = mixed.transpose(1, 2)
        convolved = [conv_silu(turned[:, :, a:b], taps, bias) for a, b in bounds]
        mixed = torch.cat([x.transpose(1, 2) for x in convolved], dim=1)
    query, key, value = _heads(module, mixed, fused=kernels is not None)
    beta = beta.sigmoid()
    decay = decay + module.dt_bias.float()  # in fp32
    g = -module.A_log.float().exp() * torch.nn.functional.softplus(decay)
    gate = gate.reshape(rows, tokens, -1, module.head_v_dim)
    if shared_prompts is not None:
        each = {"q": query, "k": key, "v": value, "g": g, "beta": beta}
        out = (
            shared.rule_by_torch(each, shared_prompts)
            if by_torch
            else shared.rule_by_fla(each, shared_prompts, kernels)
        )
    elif kernels is None or by_torch:
        rule = partial(torch_rule(), use_qk_l2norm_in_kernel=True)
        parts = [tuple(x[:, a:b] for x in (query, key, value, g, beta)) for a, b in bounds]
        out = torch.cat([rule(q, k, v, g=g_, beta=beta_)[0] for q, k, v, g_, beta_ in parts], dim=1)
    else:
        options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
        options |= {name: value for name, value in known.items() if name in kernels.rule_options}
        out = kernels.rule(query, key, value, g=g, beta=beta, **options)[0]
    if kernels is not None:
        out = kernels.rms_norm_gated(out, gate, module.norm.weight, None, eps=module.layer_norm_epsilon)
    else:
        out = module.norm(out.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return module.out_proj(out.reshape(rows, tokens, -1))


def _heads(module: Any, mixed: Any, *, fused: bool) -> tuple[Any, Any, Any]:
    """[B, T, 2 keys + values] -> query and key [B, T, value heads, key size], value [B, T, value heads, value size]."""
    times = module.num_v_heads // module.num_k_heads
    if fused:
        # fla takes grouped heads, but 0.5's TileLang backward does not, and its other one raises on Hopper
        from astracli.kernels.gpu.heads import SplitHeads

        found: tuple[Any, Any, Any] = SplitHeads.apply(
            mixed, module.key_dim, module.head_k_dim, module.head_v_dim, times
        )
        return found
    rows, tokens = mixed.shape[:2]
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    query, key = (x.reshape(rows, tokens, -1, module.head_k_dim) for x in (query, key))
    value = value.reshape(rows, tokens, -1, module.head_v_dim)
    if times > 1:
        query, key = query.repeat_interleave(times, dim=2), key.repeat_interleave(times, dim=2)
    return query, key, value


def _rotate_by_hand() -> None:
    """transformers' attention turns queries and keys by a function of its module: on a GPU, one with fewer kernels."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    from astracli.kernels.gpu import heads

    plain: Any = modeling.apply_rotary_pos_emb
    known = list(inspect.signature(heads.rotate).parameters.values())
    asked = list(inspect.signature(plain).parameters.values())
    same = len(asked) == len(known) and [p.default for p in asked] == [p.default for p in known]
    if getattr(plain, "func", None) is not _by_device and same:
        chooser: Any = partial(_by_device, heads.rotate, plain)
        chooser.__wrapped__ = plain
        modeling.apply_rotary_pos_emb = chooser


def prepare_gpu(model: Any) -> None:
    """Every layer through fla's kernels where it is installed; the norms' weights are centred at zero."""
    from astracli.kernels.gpu import fused

    _rotate_by_hand()
    if fused.fla() is not None:
        install_varlen(model)
        fused.install(model, norms=("Qwen3_5RMSNorm",), mlps=("Qwen3_5MLP",), centre=1.0)
