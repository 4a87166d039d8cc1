"""Splits a projection into heads and rotates them, with gradients by hand where autograd would run many operators.

Autograd pads the gradient of every slice with zeros to the whole and adds them up, or concatenates them anew. Here a
backward pass writes each part of the gradient where it belongs. Works on any device; used where launches and memory
traffic count. Shape letters: B rows, T tokens, H heads, D head size, R rotated part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SplitHeads(torch.autograd.Function):
    """(mixed [B, T, 2 K + V], keys' width K, head size of keys, of values, times) -> queries and keys
    [B, T, K / size * times, size], every head `times` times in a row, and values [B, T, heads, size]; all contiguous.

    The same as `split`, `reshape` and `repeat_interleave`, and so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, width: int, key_size: int, value_size: int, times: int) -> Any:
        ctx.shape = mixed.shape, width, key_size, times
        query, key, value = mixed.split([width, width, mixed.shape[-1] - 2 * width], dim=-1)
        heads = (x.unflatten(-1, (-1, key_size)) for x in (query, key))
        repeated = (x.repeat_interleave(times, dim=2) if times > 1 else x.contiguous() for x in heads)
        return *repeated, value.unflatten(-1, (-1, value_size)).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        shape, width, key_size, times = ctx.shape
        d_mixed = grads[0].new_empty(shape)
        parts = d_mixed.split([width, width, shape[-1] - 2 * width], dim=-1)
        for grad, part in zip(grads[:2], parts, strict=False):
            target = part.unflatten(-1, (-1, key_size))
            copies = grad.unflatten(2, (-1, times))
            if times == 2:
                torch.add(copies[:, :, :, 0], copies[:, :, :, 1], out=target)
            else:
                torch.sum(copies, 3, out=target)
        parts[2].copy_(grads[2].flatten(2))
        return d_mixed, None, None, None, None


class Rotate(torch.autograd.Function):
    """(x [..., D], cos, sin [..., R], which broadcast and ask for no gradient) -> x with its first R turned in pairs
    (i, i + R / 2): `x * cos + rotate_half(x) * sin`, rounded like that; the rest as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out, part = torch.empty_like(x), x[..., : cos.shape[-1]]
        _write(out, x, part * cos, _halves(part, -1).mul_(sin))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        d_x, part = torch.empty_like(grad), grad[..., : cos.shape[-1]]
        _write(d_x, grad, part * cos, _halves(part * sin, 1))
        return d_x, None, None


def _halves(part: Tensor, sign: int) -> Tensor:
    """The halves of the last dimension exchanged, the one that was last times `sign`, the other times -`sign`."""
    first, last = part.chunk(2, dim=-1)
    return torch.cat((-last, first) if sign < 0 else (last, -first), dim=-1)


def _write(out: Tensor, x: Tensor, one: Tensor, other: Tensor) -> None:
    """out = one + other, and behind that what x holds there."""
    width = one.shape[-1]
    torch.add(one, other, out=out[..., :width])
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb` of the families that turn a part of a head: cos and sin [B, T, R]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
