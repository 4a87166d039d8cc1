"""The gated delta rule from a state to a state, for rows of any length, with gradients by hand through both.

`delta_rule.py` has the algorithm of one chunk with an empty state. With a state S [K, V] at its start, and with its
letters, G = cumsum(g) and D_ij = e^(G_i - G_j):

    W = v - (e^G k) S        U = T (beta W)
    out = ((q k^T / sqrt K) * D) U + (e^G q / sqrt K) S
    S at the end = e^(G_L) S + (e^(G_L - G) k)^T U

A token with g = 0 and beta = 0 leaves the state as it is, so rows may be padded on the right with such tokens.

Shape letters: B rows, L tokens, H heads, K key size, V value size, R = B x H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astracli.kernels.cpu.delta_rule import MOST_TOKENS, _back, _matrices, _rows, _unit, _unit_backward


class _Chunk(torch.autograd.Function):
    """(unit q / sqrt K, unit k [R, L, K], v [R, L, V], g, beta [R, L], state [R, K, V] or None) ->
    (out [R, L, V], state at the end)"""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total_RL = g.cumsum(-1)
        decay, keys, inverse, scores = _matrices(q, k, beta, total_RL)
        since = total_RL.exp()[..., None]
        late = (total_RL[:, -1:] - total_RL).exp()[..., None]
        w_RLV = v if state is None else torch.baddbmm(v, k * since, state, alpha=-1)
        u_RLV = torch.bmm(inverse, w_RLV * beta[..., None])
        out = torch.bmm(scores, u_RLV)
        end = torch.bmm((k * late).transpose(1, 2), u_RLV)
        if state is not None:
            out.baddbmm_(q * since, state)
            end.addcmul_(state, since[:, -1:])
        ctx.save_for_backward(q, k, w_RLV, beta, decay, keys, inverse, scores, u_RLV, since, late, state)
        return out, end

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, w_RLV, beta, decay, keys, inverse, scores, u_RLV, since, late, state = ctx.saved_tensors
        grad_RLV, d_end = grads
        d_u = torch.bmm(scores.transpose(1, 2), grad_RLV).baddbmm_(k * late, d_end)
        d_bw = torch.bmm(inverse.transpose(1, 2), d_u)
        d_scores = torch.bmm(grad_RLV, u_RLV.transpose(1, 2))
        d_a = torch.bmm(d_bw, u_RLV.transpose(1, 2)).neg_()
        d_ak = d_a * keys
        d_beta = d_ak.sum(-1) + torch.linalg.vecdot(d_bw, w_RLV)
        exponent = d_scores * scores  # gradient of G_i - G_j, [R, L, L]
        exponent.addcmul_(d_ak, beta[..., None])
        d_total = exponent.sum(2) - exponent.sum(1)
        d_qk = d_scores.mul_(decay)
        d_kk = d_a.mul_(decay).mul_(beta[..., None]).tril_(-1)
        d_q = torch.bmm(d_qk, k)
        d_k = torch.bmm(d_qk.transpose(1, 2), q).baddbmm_(d_kk, k).baddbmm_(d_kk.transpose(1, 2), k)
        to_end = torch.bmm(u_RLV, d_end.transpose(1, 2)).mul_(late)  # of k, through the state at the end
        d_k += to_end
        moved = torch.linalg.vecdot(to_end, k)
        d_total -= moved
        d_total[:, -1] += moved.sum(-1)
        d_w, d_state = d_bw.mul_(beta[..., None]), None
        if state is not None:
            kept = d_end * since[:, -1:]
            d_total[:, -1] += (kept * state).sum((1, 2))
            from_q = torch.bmm(grad_RLV, state.transpose(1, 2)).mul_(since)
            from_k = torch.bmm(d_w, state.transpose(1, 2)).mul_(since).neg_()
            d_total += torch.linalg.vecdot(from_q, q) + torch.linalg.vecdot(from_k, k)
            d_q += from_q
            d_k += from_k
            d_state = kept.baddbmm_((q * since).transpose(1, 2), grad_RLV)
            d_state.baddbmm_((k * since).transpose(1, 2), d_w, alpha=-1)
        d_g = d_total.flip(-1).cumsum(-1).flip(-1)
        return d_q, d_k, d_w, d_g, d_beta, d_state


class _UnitRows(torch.autograd.Function):
    """x [B, L, H, D] -> x / |x| * scale as [R, L, D]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        unit, inverse = _unit(_rows(x))
        ctx.save_for_backward(unit, inverse)
        ctx.heads, ctx.scale = x.shape[2], scale
        return unit * scale if scale != 1.0 else unit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        unit, inverse = ctx.saved_tensors
        return _back(_unit_backward(grads[0] * ctx.scale, unit, inverse), ctx.heads), None


def rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k [B, L, H, K] of any length, v [B, L, H, V], g, beta [B, L, H], state [B, H, K, V] or None (empty) ->
    (out [B, L, H, V], state at the end [B, H, K, V]). Computed in fp32."""
    heads, kind = q.shape[2], v.dtype
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    rows = [_UnitRows.apply(q, q.shape[3] ** -0.5), _UnitRows.apply(k, 1.0), _rows(v)]
    rows += [x.transpose(1, 2).flatten(0, 1) for x in (g, beta)]
    held = None if state is None else state.flatten(0, 1).float()
    outs = []
    for chunk in zip(*(x.split(MOST_TOKENS, dim=1) for x in rows), strict=True):
        out, held = _Chunk.apply(*chunk, held)
        outs.append(out)
    assert held is not None
    joined = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return _back(joined, heads).to(kind), held.unflatten(0, (-1, heads))
