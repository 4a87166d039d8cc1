"""fla's Triton kernels in the place of eager torch: RMS norms and gated MLPs of any family.

In eager torch a norm in bf16 is six kernels over fp32 copies; a gated MLP keeps silu(gate) * up for the backward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from astracli.kernels import weight_gradients
from astracli.kernels.upload import upload

delta_rule_by_torch = False
"""Set by a trainer for which `backend_delta_rule` found that fla's backward pass is wrong or raises on these GPUs."""


@lru_cache
def fla() -> Any:
    """fla's kernels where they run; None without fla or without a GPU."""
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
        from fla.modules.activations.ops import swiglu_fwd, swiglu_fwdbwd
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError:
        from fla.modules.activations import swiglu_fwd, swiglu_fwdbwd
        from fla.modules.convolution import causal_conv1d
    thin_tuning(module for name, module in list(sys.modules.items()) if name.startswith("fla."))
    return SimpleNamespace(
        swiglu_linear=swiglu_linear,
        swiglu=partial(swiglu_fwd, output_contiguous=True),
        swiglu_again=partial(swiglu_fwdbwd, use_weight=True, output_contiguous=True),
        rms_norm=rms_norm,
        rms_norm_gated=rms_norm_gated,
        rule=chunk_gated_delta_rule,
        rule_options=frozenset(inspect.signature(chunk_gated_delta_rule).parameters),
        conv=causal_conv1d,
    )


CHUNK = 64
"""Tokens that fla's convolution and delta rule take at once."""


@lru_cache(maxsize=12)
def chunks(cu_seqlens_host: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """What fla's kernels need to know of a packed row's segments, made on the host: they would read `cu_seqlens` back.

    `chunk_indices`: int32 [chunks, 2], the segment of every chunk and its number there; `cu_seqlens_cpu`: int64.
    """
    bounds = np.asarray(cu_seqlens_host, np.int64)
    counts = -(-np.diff(bounds) // CHUNK)
    segment = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = upload(np.stack([segment, number], 1).astype(np.int32), device)
    return {"chunk_indices": indices, "cu_seqlens_cpu": torch.from_numpy(bounds)}


MOST_CONFIGS = 4
_WARPS = (4, 8)


def thin_tuning(modules: Iterable[Any]) -> int:
    """Let the kernels of these modules try few configurations, and once for all row lengths. Returns how many do.

    fla tries up to 30 compilations a kernel, for some of them anew for every one or two thousand rows (the key `NB`, a
    count of blocks): minutes before the first step, on kernels that wait for memory under any of them. Configurations
    of 4 or 8 warps stay, at most `MOST_CONFIGS`, spread over what was there.
    """
    thinned = set()
    for module in modules:
        for kernel in list(vars(module).values()):
            while kernel is not None and not (hasattr(kernel, "configs") and hasattr(kernel, "keys")):
                kernel = getattr(kernel, "fn", None)
            if kernel is None or not isinstance(kernel.configs, list) or not isinstance(kernel.keys, list):
                continue
            kernel.keys = [key for key in kernel.keys if key != "NB"]
            fit = [c for c in kernel.configs if c.num_warps in _WARPS] or kernel.configs
            last = len(fit) - 1
            kept = min(MOST_CONFIGS, len(fit))
            kernel.configs = [fit[i * last // max(1, kept - 1)] for i in range(kept)]
            thinned.add(id(kernel))
    return len(thinned)


def install(model: Any, *, norms: Collection[str], mlps: Collection[str], centre: float = 0.0) -> None:
    """Let modules of these class names compute with fla where it is installed: the same function, fewer kernels.

    Norms hold `weight` and `variance_epsilon` or `eps`, and scale by `centre` + weight; MLPs hold `gate_proj`,
    `up_proj` and `down_proj`, with silu between them, and are left as they are under another activation.
    """
    if fla() is None:
        return
    silu = getattr(model.config, "hidden_act", None) in ("silu", "swish")
    for module in model.modules():
        name = type(module).__name__
        if name in norms:
            module.forward = partial(_norm, module, centre)
        elif name in mlps and silu:
            module.forward = partial(_mlp, module)


def _norm(module: Any, centre: float, x: Tensor) -> Tensor:
    """[..., D] -> [..., D]; the scale in fp32, as engines compute it. A weight that is the scale is read in its own
    dtype: the kernel takes it to fp32 itself, and adds up its gradient in fp32."""
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    scale = module.weight + _one_number(centre, x.device) if centre else module.weight
    normal: Tensor = fla().rms_norm(x, scale, None, eps=epsilon)
    return normal


@lru_cache
def _one_number(value: float, device: torch.device) -> Tensor:
    """fp32 [1]: with a tensor in bf16 it computes in fp32, without a copy of that in fp32."""
    return torch.full((1,), value, dtype=torch.float32, device=device)


def _mlp(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate) * up); the product is not kept but made again in the backward pass."""
    layers = module.gate_proj, module.up_proj, module.down_proj
    sums = [place for layer in layers if (place := weight_gradients.served(layer)) is not None]
    kernels, down = fla(), module.down_proj
    result: Tensor
    if len(sums) == len(layers) and all(layer.bias is None for layer in layers):
        weights = [*(layer.weight for layer in layers), *weight_gradients.anchors(sums)]
        result = weight_gradients.GatedMlp.apply(x, kernels.swiglu, kernels.swiglu_again, sums, *weights)
    elif any(isinstance(place, weight_gradients.LowRank) for place in sums):  # some of the three have an adapter
        gate_and_up = module.gate_proj(x), module.up_proj(x)
        result = down(weight_gradients.GatedProduct.apply(*gate_and_up, kernels.swiglu, kernels.swiglu_again))
    else:
        result = kernels.swiglu_linear(module.gate_proj(x), module.up_proj(x), down.weight, down.bias)
    return result
