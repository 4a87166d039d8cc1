"""A stand-in for SGLang's compiled kernels on a CPU: what its Qwen3.5 and Llama paths call, in plain torch.

SGLang brings its own code for every CPU where one of its layers has it; what it asks of its `sgl_kernel` build without
asking whether that is there stands here. Anything else that is imported from this package raises when it is called.
Slow, and exact: recurrences and norms in fp32, results in the dtype of their input.

Shape letters: T tokens of all sequences of a batch, B sequences, H query/key heads, HV value heads (a multiple of H),
K and V head sizes, D width of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _rms(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """fp32, over the last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale.float()


def fused_sigmoid_mul_cpu(x: Tensor, gate: Tensor, inplace: bool = False) -> Tensor:
    """[T, D] * sigmoid(gate [T, D] or [T, H, K])"""
    result = (x.float() * torch.sigmoid(gate.reshape(x.shape).float())).to(x.dtype)
    return x.copy_(result) if inplace else result


def fused_qk_gemma_rmsnorm_cpu(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """[T, H * K] and [T, H' * K] -> [T * H, K] and [T * H', K], normalised by head and scaled by 1 + weight."""
    return tuple(
        _rms(x.reshape(-1, head_dim), 1.0 + weight.float(), eps).to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`q_gate` [T, H * 2 K], each head's query before its gate -> q, k as above and the gate [T, H * K]."""
    query, gate = q_gate.reshape(q_gate.shape[0], heads, 2 * head_dim).chunk(2, -1)
    q, k = fused_qk_gemma_rmsnorm_cpu(query, k, q_weight, k_weight, eps, head_dim)
    return q, k, gate.reshape(gate.shape[0], -1)


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: Tensor, ba: Tensor, heads: int, value_heads: int, head_k: int, head_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[q | k | v | z] and [b | a], whole parts side by side -> [T, q | k | v], z [T, HV, V], b and a [T, HV]."""
    values = value_heads * head_v
    qkv, z = qkvz.split([2 * heads * head_k + values, values], dim=-1)
    b, a = ba.split([value_heads, value_heads], dim=-1)
    return qkv.contiguous(), z.reshape(-1, value_heads, head_v), b.contiguous(), a.contiguous()


def fused_rmsnorm_gated_cpu(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Normalised and scaled, then times silu(gate); [T * HV, V]."""
    return (_rms(x, weight, eps) * F.silu(gate.float())).to(x.dtype)


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log-decay -exp(A_log) softplus(a + dt_bias) and write strength sigmoid(b), fp32 [1, T, HV]."""
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay[None], torch.sigmoid(b.float())[None]


def fused_sigmoid_gating_delta_rule_update_cpu(
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **_: object,
) -> Tensor:
    """One step of every sequence: q, k [1, B, H, K], v [1, B, HV, V], states [slots, HV, V, K] -> [1, B, HV, V]."""
    decay, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    return _delta_rule(q, k, v, decay, beta, initial_state_source, initial_state_indices, cu_seqlens)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, states: Tensor, slots: Tensor, starts: Tensor
) -> Tensor:
    """The gated delta rule token by token, sequences side by side; `states` [slots, HV, V, K] are left as they end.

    S <- exp(decay) S; S <- S + beta (v - S k) k^T; out = S q / sqrt(K), with q and k of unit length.
    """
    lengths = starts.diff().tolist()
    live = [i for i, slot in enumerate(slots.tolist()) if slot >= 0 and lengths[i]]
    group = v.shape[2] // q.shape[2]

    def rows(x: Tensor) -> list[Tensor]:
        return [x[0, int(starts[i]) : int(starts[i]) + lengths[i]].float() for i in live]

    def padded(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows(x), batch_first=True)

    out = torch.zeros_like(v)
    if not live:
        return out
    query, key = (F.normalize(padded(x), dim=-1, eps=1e-6).repeat_interleave(group, 2) for x in (q, k))
    query, value, keep, write = query * q.shape[-1] ** -0.5, padded(v), padded(decay).exp(), padded(beta)
    places = slots[live].long()
    state = states[places].float()
    outs = []
    for t in range(query.shape[1]):
        going = torch.tensor([t < lengths[i] for i in live])[:, None, None, None]
        decayed = state * keep[:, t, :, None, None]
        missing = write[:, t, :, None] * (value[:, t] - torch.einsum("bhvk,bhk->bhv", decayed, key[:, t]))
        state = torch.where(going, decayed + missing[..., None] * key[:, t, :, None, :], state)
        outs.append(torch.einsum("bhvk,bhk->bhv", state, query[:, t]))
    states[places] = state.to(states.dtype)
    found = torch.stack(outs, 1)
    for row, i in enumerate(live):
        out[0, int(starts[i]) : int(starts[i]) + lengths[i]] = found[row, : lengths[i]].to(v.dtype)
    return out


for _op in (
    fused_sigmoid_mul_cpu,
    fused_qk_gemma_rmsnorm_cpu,
    fused_qk_gemma_rmsnorm_with_gate_cpu,
    fused_qkvzba_split_reshape_cat_contiguous_cpu,
    fused_rmsnorm_gated_cpu,
    fused_gdn_gating_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
):
    setattr(torch.ops.sgl_kernel, _op.__name__, _op)


def __getattr__(name: str) -> object:
    """Names that other paths of SGLang import and that nothing here calls."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on this CPU")

    return absent
