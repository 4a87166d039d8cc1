"""The convolution and the delta rule of SGLang's linear-attention backend, in plain torch. Letters: see the package."""

import sglang.kernels.ops.attention.fla.layernorm_gated as _gated
import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import _delta_rule

_gated._use_cpu = True  # its other way is a GPU kernel


def chunk_gated_delta_rule_cpu(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **_: object,
) -> tuple[Tensor, None, None]:
    """Sequences one behind the other: q, k [1, T, H, K], v [1, T, HV, V] -> ([1, T, HV, V], None, None); states are
    updated where they lie."""
    return _delta_rule(q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens), None, None


def causal_conv1d_fn_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    **_: object,
) -> Tensor:
    """Depthwise, causal, sequence by sequence: x [D, T], weight [D, W], states [slots, D, W - 1] -> [D, T]."""
    out = torch.zeros_like(x)
    width = weight.shape[1]
    bounds = query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        first, last = bounds[i], bounds[i + 1]
        if slot < 0 or first == last:
            continue
        before = conv_states[slot].float() if has_initial_state[i] else x.new_zeros(x.shape[0], width - 1).float()
        line = torch.cat([before, x[:, first:last].float()], dim=1)
        out[:, first:last] = _convolved(line, weight, bias, activation).to(x.dtype)
        conv_states[slot] = line[:, line.shape[1] - width + 1 :].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: Tensor,
    **_: object,
) -> Tensor:
    """The next token of every sequence: x [B, D] -> [B, D]."""
    places = conv_state_indices.long()
    line = torch.cat([conv_state[places].float(), x[:, :, None].float()], dim=2)
    conv_state[places] = line[:, :, 1:].to(conv_state.dtype)
    return _convolved(line, weight, bias, activation)[:, :, 0].to(x.dtype)


def _convolved(line: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """[..., D, W - 1 + n] -> [..., D, n]"""
    out = F.conv1d(line, weight.float()[:, None], bias.float() if bias is not None else None, groups=weight.shape[0])
    return F.silu(out) if activation in ("silu", "swish") else out
