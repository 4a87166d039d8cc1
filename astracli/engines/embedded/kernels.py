"""Quicker single-token steps of the gated delta rule and of the convolution before it for CPUs, in place on the slots'
states.

For every token transformers' reference of the rule makes five temporaries as large as the state, that of the
convolution two. These read the state once and update it where it lies. Same arithmetic up to rounding (1e-6 relative).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_REFERENCE = "torch_recurrent_gated_delta_rule"
_CONVOLUTION = "torch_causal_conv1d_update"


def install(model: Any, *, convolution: bool = True) -> bool:
    """Make a model's layers use them in place of transformers' references. Returns whether the model has such layers.

    Layers hold the rule as an attribute; in newer transformers they call it by its name in their modeling module, which
    is then changed for this whole process.
    """
    used = False
    for module in model.modules():
        rule = getattr(module, "recurrent_gated_delta_rule", None)
        if getattr(rule, "__name__", "") == _REFERENCE:
            module.recurrent_gated_delta_rule = _DeltaRuleStep(rule)
        update = getattr(module, "causal_conv1d_update", None)
        if convolution and getattr(update, "__name__", "") == _CONVOLUTION:
            module.causal_conv1d_update = _ConvolutionStep(update)
        used |= isinstance(getattr(module, "recurrent_gated_delta_rule", None), _DeltaRuleStep)
    if used:
        return True
    for home in {type(module).__module__ for module in model.modules() if hasattr(module, "A_log")}:
        modeling = sys.modules[home]
        rule = getattr(modeling, _REFERENCE, None)
        if rule is not None and not isinstance(rule, _DeltaRuleStep):
            setattr(modeling, _REFERENCE, _DeltaRuleStep(rule))
        used |= rule is not None
    return used


class _DeltaRuleStep:
    """Callable with the reference's signature; anything but one token on an fp32 state goes to the reference."""

    def __init__(self, reference: Any):
        self.reference = reference

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        state = options.get("initial_state")
        if query.shape[1] != 1 or state is None or state.dtype != torch.float32 or not options["output_final_state"]:
            return self.reference(query, key, value, g=g, beta=beta, **options)
        return step_(query, key, value, g, beta, state, norm=options.get("use_qk_l2norm_in_kernel", False))


def step_(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, norm: bool
) -> tuple[Tensor, Tensor]:
    """S <- e^g S + k d^T with d = beta (v - e^g S^T k); out = S^T q. `state` is changed in place and returned.

    Shapes: query, key [N, 1, H or fewer, K]; value [N, 1, H, V]; g, beta [N, 1, H]; state fp32 [N, H, K, V].
    Returns (out [N, 1, H, V], state).
    """
    rows, _, heads, value_dim = value.shape
    key_dim = key.shape[-1]
    q, k = query[:, 0].float(), key[:, 0].float()
    if key.shape[2] != heads:  # each key head serves several value heads
        q, k = (x.repeat_interleave(heads // key.shape[2], dim=1) for x in (q, k))
    if norm:
        q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    q = q * key_dim**-0.5
    decay = g[:, 0].float().exp()[..., None]
    flat = state.view(rows * heads, key_dim, value_dim)
    pair = torch.stack((k, q), dim=2).view(rows * heads, 2, key_dim)
    seen = torch.bmm(pair, flat).view(rows, heads, 2, value_dim) * decay[..., None]
    delta = (value[:, 0].float() - seen[:, :, 0]) * beta[:, 0].float()[..., None]
    out = seen[:, :, 1] + (q * k).sum(-1, keepdim=True) * delta
    state.mul_(decay[..., None]).addcmul_(k[..., None], delta[..., None, :])
    return out[:, None].to(query.dtype), state


class _ConvolutionStep:
    """Callable with the reference's signature; anything but one token in fp32 without a bias goes to the reference."""

    def __init__(self, reference: Any):
        self.reference = reference

    def __call__(
        self, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        single = x.shape[-1] == 1 and state.shape[-1] == weight.shape[-1] > 1 and bias is None
        if single and x.dtype == state.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled():
            return convolve_(x, state, weight)
        return self.reference(x, state, weight, bias, activation)


def convolve_(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
    """silu of the causal depthwise convolution at one token; the window `state` moves on by it, in place.

    Shapes: x [N, C, 1], state [N, C, J], weight [C, J]. Returns [N, C, 1].
    """
    window = [*state.unbind(-1)[1:], x[..., 0]]
    out = window[0] * weight[:, 0]
    for tap, column in zip(window[1:], weight.unbind(-1)[1:], strict=True):
        out.addcmul_(tap, column)
    for place, tap in zip(state.unbind(-1), window, strict=True):
        place.copy_(tap)
    return torch.nn.functional.silu(out, inplace=True)[..., None]
