"""Attention of a packed row in which a group's prompt stands once: each sample sees its prompt and itself.

Two passes, merged: every segment over itself, causally; and the samples of a prompt over all of that prompt. With the
log-sum-exp of both, out = e^(lse1 - lse) out1 + e^(lse2 - lse) out2, where lse is that of both together. An attention
kernel's backward pass needs of its forward pass only the probabilities, e^(score - lse), and the sum of out times its
gradient. Given the merged `out` and `lse`, each pass therefore computes its own part of the gradient exactly, and the
parts are added; so no gradient goes through the merging.

Shape letters: H query heads, G key and value heads, T tokens of the row, n queries, m keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from astracli.kernels.shared_rows import SharedRow

Around = Callable[[], Any]
"""Makes what surrounds the launch of a backward kernel, a context."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: SharedRow,
    scale: float,
    window: int | None,
    *,
    cu_seqlens: Tensor,
    longest: int,
    flash: bool,
    around: Around,
) -> Tensor:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `window`: a token sees itself and `window` - 1 tokens before, counted through the prompt. `flash`: the GPU's kernels
    take these tensors.
    """
    if window is not None and longest + _longest(row.prompt_bounds) <= window:
        window = None
    kernel: _Kernel
    if flash and window is None:
        kernel = _Flash(row, scale, cu_seqlens, longest)
    elif query.is_cuda or window is not None:
        kernel = PlainKernel(row, scale, window)
    else:
        kernel = CpuKernel(row, scale)
    tokens = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    out: Tensor = Attention.apply(*tokens, kernel, around)
    return out[None]


def _longest(bounds: tuple[int, ...]) -> int:
    return max((b - a for a, b in pairwise(bounds)), default=0)


Found = tuple[Tensor, Tensor]
"""(out [n, H, D], log-sum-exp fp32 [n, H])"""
Gradients = tuple[Tensor, Tensor, Tensor]


class _Kernel:
    """The two passes on one kind of device, forward and backward. Tensors are [tokens, heads, D]."""

    def __init__(self, row: SharedRow, scale: float):
        self.row, self.scale = row, scale

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        """Every segment over itself."""
        raise NotImplementedError

    def own_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        raise NotImplementedError

    def prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        """The samples of every prompt over it: `q` holds the samples, `k` and `v` the prompts."""
        raise NotImplementedError

    def prompt_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        raise NotImplementedError


class Attention(torch.autograd.Function):
    """(q, k, v [T, heads, D], kernel, what surrounds a backward kernel) -> [T, H, D]"""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: _Kernel, around: Around) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        row = kernel.row
        samples, prompts = slice(row.prompt_end, row.sample_end), slice(0, row.prompt_end)
        out, lse = kernel.own(q, k, v)
        if row.roots:
            theirs, lse_theirs = kernel.prompt(q[samples], k[prompts], v[prompts])
            both = torch.logaddexp(lse[samples], lse_theirs)
            ours = out[samples] * (lse[samples] - both).exp()[..., None]  # in the precision of lse
            out[samples] = ours.addcmul_(theirs.to(both.dtype), (lse_theirs - both).exp()[..., None]).to(out.dtype)
            lse[samples] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.around = kernel, around
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, grad = ctx.kernel, grads[0].contiguous()
        row = kernel.row
        samples, prompts = slice(row.prompt_end, row.sample_end), slice(0, row.prompt_end)
        with ctx.around():
            d_q, d_k, d_v = kernel.own_backward(grad, q, k, v, (out, lse))
            if row.roots:
                merged = out[samples], lse[samples]
                more = kernel.prompt_backward(grad[samples], q[samples], k[prompts], v[prompts], merged)
                for total, part, where in zip((d_q, d_k, d_v), more, (samples, prompts, prompts), strict=True):
                    total[where] += part
        return d_q, d_k, d_v, None, None


class _Flash(_Kernel):
    """torch's own flash attention over segments of any length. bf16 or fp16, on a GPU."""

    def __init__(self, row: SharedRow, scale: float, cu_seqlens: Tensor, longest: int):
        super().__init__(row, scale)
        groups, prompts = row.on_device["groups"], row.on_device["prompts"]
        self._own = cu_seqlens, cu_seqlens, longest, longest
        self._prompt = groups, prompts, _longest(row.group_bounds), _longest(row.prompt_bounds)
        self._states: dict[bool, tuple[Tensor, Tensor]] = {}

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        return self._forward(q, k, v, causal=True)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        return self._forward(q, k, v, causal=False)

    def own_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        return self._backward(grad, q, k, v, found, causal=True)

    def prompt_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        return self._backward(grad, q, k, v, found, causal=False)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Found:
        where = self._own if causal else self._prompt
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *where, 0.0, causal, False, scale=self.scale
        )
        self._states[causal] = state[0], state[1]
        return out, lse.t()  # the kernel's is [H, n]

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found, *, causal: bool
    ) -> Gradients:  # fmt: skip
        where, (out, lse) = self._own if causal else self._prompt, found
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse.t().contiguous(), *where, 0.0, causal, *self._states[causal], scale=self.scale
        )
        return d_q, d_k, d_v


class CpuKernel(_Kernel):
    """torch's flash attention for CPUs: segments in padded batches, and one prompt at a time."""

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        padding = self.row.padded
        batches = zip(*(padding.split(x.index_select(0, padding.columns)) for x in (q, k, v)), strict=True)
        found = [self._forward(*(x.transpose(1, 2) for x in batch), causal=True) for batch in batches]
        outs, lses = ([x.transpose(1, 2).flatten(0, 1) for x in part] for part in zip(*found, strict=True))
        return tuple(torch.cat(part).index_select(0, padding.cells) for part in (outs, lses))  # type: ignore[return-value]

    def own_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        padding = self.row.padded
        padded = padding.zeroed(grad.index_select(0, padding.columns))
        others = (x.index_select(0, padding.columns) for x in (q, k, v, *found))
        batches = zip(*(padding.split(x) for x in (padded, *others)), strict=True)
        each = [self._backward(*(x.transpose(1, 2) for x in batch), causal=True) for batch in batches]
        flat = ([x.transpose(1, 2).flatten(0, 1) for x in part] for part in zip(*each, strict=True))
        return tuple(torch.cat(part).index_select(0, padding.cells) for part in flat)  # type: ignore[return-value]

    def prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        each = [self._forward(*(_batch(x) for x in part), causal=False) for part in self._prompts((q,), (k, v))]
        return tuple(torch.cat([_tokens(x) for x in part]) for part in zip(*each, strict=True))  # type: ignore[return-value]

    def prompt_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        each = []
        for grad_, q_, out, lse, k_, v_ in self._prompts((grad, q, *found), (k, v)):
            each.append(self._backward(*(_batch(x) for x in (grad_, q_, k_, v_, out, lse)), causal=False))
        return tuple(torch.cat([_tokens(x) for x in part]) for part in zip(*each, strict=True))  # type: ignore[return-value]

    def _prompts(self, of_samples: tuple[Tensor, ...], of_prompts: tuple[Tensor, ...]) -> Any:
        """The tensors of every prompt, one prompt after the other."""
        row = self.row
        for (a, b), (c, d) in zip(pairwise(row.group_bounds), pairwise(row.prompt_bounds), strict=True):
            yield (*(x[a:b] for x in of_samples), *(x[c:d] for x in of_prompts))

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Found:
        """[B, heads, n, D] -> (out [B, H, n, D], lse [B, H, n])"""
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v)) if times > 1 else (k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=self.scale)
        return out, lse

    def _backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
    ) -> Gradients:
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v)) if times > 1 else (k, v)
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=self.scale
        )
        if times > 1:
            d_k, d_v = (x.unflatten(1, (-1, times)).sum(2) for x in (d_k, d_v))
        return d_q, d_k, d_v


def _batch(x: Tensor) -> Tensor:
    """[n, heads, ...] -> [1, heads, n, ...]"""
    return x.transpose(0, 1)[None]


def _tokens(x: Tensor) -> Tensor:
    """The inverse of `_batch`."""
    return x.squeeze(0).transpose(0, 1)


@dataclass(frozen=True)
class _Piece:
    """Some queries and the keys that they may see."""

    queries: slice
    keys: slice
    seen: Tensor | None
    """bool [n, m]; None: all"""


class PlainKernel(_Kernel):
    """Plain products, on any device and for sliding windows: scores of one segment at a time are held."""

    def __init__(self, row: SharedRow, scale: float, window: int | None):
        super().__init__(row, scale)
        self.window = window

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        return self._forward(q, k, v, self._own_pieces())

    def own_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        return self._backward(grad, q, k, v, found, self._own_pieces())

    def prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Found:
        return self._forward(q, k, v, self._prompt_pieces())

    def prompt_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Gradients:
        return self._backward(grad, q, k, v, found, self._prompt_pieces())

    def _seen(self, queries: int, keys: int, ahead: int) -> Tensor:
        """`ahead`: the place of the first query, counted from the first key."""
        device = self.row.device
        back = torch.arange(ahead, ahead + queries, device=device)[:, None] - torch.arange(keys, device=device)
        return (back >= 0) if self.window is None else (back >= 0) & (back < self.window)

    def _own_pieces(self) -> list[_Piece]:
        spans = pairwise(self.row.bounds)
        return [_Piece(slice(a, b), slice(a, b), self._seen(b - a, b - a, 0)) for a, b in spans]

    def _prompt_pieces(self) -> list[_Piece]:
        row, pieces = self.row, []
        for parent, (a, b) in zip(row.parents, pairwise(row.rest_bounds), strict=False):
            c, d = row.bounds[parent], row.bounds[parent + 1]
            seen = None if self.window is None else self._seen(b - a, d - c, d - c)
            pieces.append(_Piece(slice(a, b), slice(c, d), seen))
        return pieces

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, pieces: list[_Piece]) -> Found:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for piece in pieces:
            scores = self._scores(q, k, piece)
            lse_Hn = scores.logsumexp(-1)
            share = (scores - lse_Hn[..., None]).exp_().nan_to_num_(0.0)  # nothing is seen: -inf less -inf
            out[piece.queries] = (share @ self._heads(v[piece.keys], q).to(share.dtype)).transpose(0, 1).to(q.dtype)
            lse[piece.queries] = lse_Hn.t()
        return out, lse

    def _backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Found, pieces: Any) -> Gradients:
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=found[1].dtype, device=x.device) for x in (q, k, v))
        for piece in pieces:
            share = (self._scores(q, k, piece) - found[1][piece.queries].t()[..., None]).exp_()
            grad_, out, q_ = (x[piece.queries].transpose(0, 1).to(share.dtype) for x in (grad, found[0], q))
            k_, v_ = (self._heads(x[piece.keys], q).to(share.dtype) for x in (k, v))
            d_scores = (grad_ @ v_.transpose(1, 2) - (grad_ * out).sum(-1, keepdim=True)).mul_(share).mul_(self.scale)
            d_q[piece.queries] += (d_scores @ k_).transpose(0, 1)
            d_k[piece.keys] += self._summed(d_scores.transpose(1, 2) @ q_, k)
            d_v[piece.keys] += self._summed(share.transpose(1, 2) @ grad_, v)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, piece: _Piece) -> Tensor:
        """[H, n, m], in fp32 or better"""
        exact = torch.promote_types(q.dtype, torch.float32)
        q_, k_ = q[piece.queries].transpose(0, 1).to(exact), self._heads(k[piece.keys], q).to(exact)
        scores = (q_ @ k_.transpose(1, 2)).mul_(self.scale)
        return scores if piece.seen is None else scores.masked_fill_(~piece.seen, float("-inf"))

    @staticmethod
    def _heads(x: Tensor, q: Tensor) -> Tensor:
        """[m, G, D] -> [H, m, D]"""
        return x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0)

    @staticmethod
    def _summed(x: Tensor, like: Tensor) -> Tensor:
        """[H, m, D] -> [m, G, D]"""
        return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)
