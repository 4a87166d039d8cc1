"""The gated delta rule and the short convolution before it, for rows of one chunk, with gradients by hand.

A row of up to MOST_TOKENS tokens is one chunk with an empty state, so the chunked algorithm (arXiv 2412.06464, section
3.3) closes: with q, k of unit length, G = cumsum(g), D_ij = e^(G_i - G_j) for j <= i,

    A = strictly lower part of beta_i (k_i . k_j) D_ij      T = (I + A)^-1
    U = T (beta v)                                          out = ((q k^T / sqrt K) * D) U

A reference that builds T row by row in Python runs hundreds of small operations; here it is one triangular solve.

Shape letters: B rows, L tokens, H heads, K key size, V value size, R = B x H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 64
"""Longest row treated as one chunk, which is the reference's chunk: an inverse over more tokens loses digits."""
_EPS = 1e-6


def _rows(x_BLHD: Tensor) -> Tensor:
    """[B, L, H, D] -> contiguous [R, L, D]"""
    return x_BLHD.transpose(1, 2).reshape(-1, x_BLHD.shape[1], x_BLHD.shape[3])


def _back(x_RLD: Tensor, heads: int) -> Tensor:
    """[R, L, D] -> [B, L, H, D]"""
    return x_RLD.view(-1, heads, *x_RLD.shape[1:]).transpose(1, 2)


def _unit(x_RLD: Tensor) -> tuple[Tensor, Tensor]:
    inverse_RL1 = torch.linalg.vecdot(x_RLD, x_RLD).add_(_EPS).rsqrt_()[..., None]
    return x_RLD * inverse_RL1, inverse_RL1


def _unit_backward(grad_RLD: Tensor, unit_RLD: Tensor, inverse_RL1: Tensor) -> Tensor:
    """Of x -> x / |x|: the part of the gradient across x, over |x|. Changes `grad_RLD`."""
    along_RL1 = torch.linalg.vecdot(grad_RLD, unit_RLD)[..., None]
    return grad_RLD.addcmul_(along_RL1, unit_RLD, value=-1).mul_(inverse_RL1)


def _matrices(q_RLK: Tensor, k_RLK: Tensor, beta_RL: Tensor, total_RL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(D, strictly lower (k k^T) * D, T, (q k^T) * D), each [R, L, L]."""
    length = q_RLK.shape[1]
    decay = total_RL[:, :, None] - total_RL[:, None, :]
    above = torch.ones(length, length, dtype=torch.bool, device=q_RLK.device).triu_(1)
    decay.masked_fill_(above, float("-inf")).exp_()
    keys = torch.bmm(k_RLK, k_RLK.transpose(1, 2)).mul_(decay).tril_(-1)
    eye = torch.eye(length, dtype=q_RLK.dtype, device=q_RLK.device).expand_as(decay)
    inverse = torch.linalg.solve_triangular(keys * beta_RL[..., None], eye, upper=False, unitriangular=True)
    scores = torch.bmm(q_RLK, k_RLK.transpose(1, 2)).mul_(decay)
    return decay, keys, inverse, scores


class _OneChunk(torch.autograd.Function):
    """(q, k [B, L, H, K], v [B, L, H, V], g, beta [B, L, H]), all fp32 -> (out [B, L, H, V], last state [B, H, K, V]).

    The last state carries no gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, key_dim = q.shape
        unit_q, inverse_q = _unit(_rows(q))
        unit_k, inverse_k = _unit(_rows(k))
        v_RLV, beta_RL = _rows(v), beta.transpose(1, 2).reshape(-1, length)
        total_RL = g.transpose(1, 2).reshape(-1, length).cumsum(-1)
        scaled_q = unit_q * key_dim**-0.5
        decay, keys, inverse, scores = _matrices(scaled_q, unit_k, beta_RL, total_RL)
        u_RLV = torch.bmm(inverse, v_RLV * beta_RL[..., None])
        out = torch.bmm(scores, u_RLV)
        ctx.save_for_backward(unit_q, inverse_q, unit_k, inverse_k, v_RLV, beta_RL, decay, keys, inverse, scores, u_RLV)
        ctx.heads = heads
        late_RL1 = (total_RL[:, -1:] - total_RL).exp()[..., None]
        state = torch.bmm((unit_k * late_RL1).transpose(1, 2), u_RLV).view(batch, heads, key_dim, -1)
        ctx.mark_non_differentiable(state)
        return _back(out, heads), state

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        unit_q, inverse_q, unit_k, inverse_k, v_RLV, beta_RL, decay, keys, inverse, scores, u_RLV = ctx.saved_tensors
        grad_RLV = _rows(grads[0])
        scale = unit_q.shape[-1] ** -0.5
        d_scores = torch.bmm(grad_RLV, u_RLV.transpose(1, 2))
        d_u = torch.bmm(scores.transpose(1, 2), grad_RLV)
        d_bv = torch.bmm(inverse.transpose(1, 2), d_u)
        d_a = torch.bmm(d_bv, u_RLV.transpose(1, 2)).neg_()  # its part above the diagonal meets the zeros of `keys`
        d_ak = d_a * keys
        d_beta = d_ak.sum(-1) + torch.linalg.vecdot(d_bv, v_RLV)
        exponent = d_scores * scores  # gradient of G_i - G_j, [R, L, L]
        exponent.addcmul_(d_ak, beta_RL[..., None])
        d_total = exponent.sum(2) - exponent.sum(1)
        d_g = d_total.flip(-1).cumsum(-1).flip(-1)
        d_qk = d_scores.mul_(decay)
        d_kk = d_a.mul_(decay).mul_(beta_RL[..., None]).tril_(-1)
        d_q = torch.bmm(d_qk, unit_k).mul_(scale)
        d_k = torch.bmm(d_qk.transpose(1, 2), unit_q).mul_(scale)
        d_k.baddbmm_(d_kk, unit_k).baddbmm_(d_kk.transpose(1, 2), unit_k)
        heads = ctx.heads
        return (
            _back(_unit_backward(d_q, unit_q, inverse_q), heads),
            _back(_unit_backward(d_k, unit_k, inverse_k), heads),
            _back(d_bv.mul_(beta_RL[..., None]), heads),
            _back(d_g[..., None], heads)[..., 0],
            _back(d_beta[..., None], heads)[..., 0],
        )


def rule(
    reference: Callable[..., Any], longest_chunk: int, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """A chunked gated delta rule with the signature of `reference`, which gets what does not fit in one chunk.

    q, k [B, L, H, K], v [B, L, H, V]; g, beta [B, L, H] among the options. Returns (out [B, L, H, V], last state or
    None when it is not asked for).
    """
    length = q.shape[1]
    plain = (
        length <= MOST_TOKENS
        and options.get("initial_state") is None
        and options.get("use_qk_l2norm_in_kernel")
        and k.shape == q.shape
        and all(x.dtype == torch.float32 for x in (q, k, v, options["g"], options["beta"]))
        and not (options.get("output_final_state") and torch.is_grad_enabled())
    )
    if not plain:
        result: tuple[Tensor, Tensor | None] = reference(q, k, v, chunk_size=min(longest_chunk, length), **options)
        return result
    out, state = _OneChunk.apply(q, k, v, options["g"], options["beta"])
    return out, state if options.get("output_final_state") else None


class _ConvSilu(torch.autograd.Function):
    """(x [B, L, C], weight [C, J]) -> silu of the causal depthwise convolution, [B, L, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        taps_JC = weight.t().contiguous()
        last = len(taps_JC) - 1
        mixed = x * taps_JC[last]
        for back in range(1, min(last + 1, x.shape[1])):
            mixed[:, back:].addcmul_(x[:, :-back], taps_JC[last - back])
        ctx.save_for_backward(x, taps_JC, mixed)
        return torch.nn.functional.silu(mixed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None]:
        x, taps_JC, mixed = ctx.saved_tensors
        last = len(taps_JC) - 1
        grad = torch.ops.aten.silu_backward(grads[0], mixed)
        d_x = grad * taps_JC[last]
        for back in range(1, min(last + 1, x.shape[1])):
            d_x[:, :-back].addcmul_(grad[:, back:], taps_JC[last - back])
        if not ctx.needs_input_grad[1]:
            return d_x, None
        d_taps = torch.zeros_like(taps_JC)
        d_taps[last] = (grad * x).sum((0, 1))
        for back in range(1, min(last + 1, x.shape[1])):
            d_taps[last - back] = (grad[:, back:] * x[:, :-back]).sum((0, 1))
        return d_x, d_taps.t()


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "silu", **kwargs: Any) -> Tensor:
    """Causal depthwise convolution and silu: x [B, C, L], weight [C, J] -> [B, C, L]; each row starts from zeros."""
    if bias is None and activation in ("silu", "swish") and x.dtype == torch.float32:
        result: Tensor = _ConvSilu.apply(x.transpose(1, 2), weight)
        return result.transpose(1, 2)
    mixed = torch.nn.functional.conv1d(
        x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=weight.shape[0]
    )[..., : x.shape[-1]]
    return torch.nn.functional.silu(mixed) if activation in ("silu", "swish") else mixed
