"""One more token for every row, in fp32 on a CPU: the parts of a layer in few operations, in place where they may be.

A decoding step of a small model is bound by the number of operations, not by arithmetic. Norms, convolution, delta rule
and attention over slots are here; an adapter puts its layers together from them (`ModelAdapter.decoding`). Nothing here
has a gradient.

Shape letters: N rows, D size of what is normalised, C channels of a convolution, J its taps, H heads, G key and value
heads, K and V sizes of a head, S slots, L columns of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from astracli.kernels.cpu import linear

_EPS = 1e-6
"""Of the unit length of queries and keys, as in `delta_rule`."""


@torch.no_grad()
def joined(layers: Sequence[nn.Linear]) -> Tensor:
    """[outputs of all, inputs]: the weights of linear layers of one input, as one matrix. From here on the layers'
    parameters are parts of it, so what is written into them is in it."""
    whole = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, whole.split([layer.weight.shape[0] for layer in layers]), strict=True):
        layer.weight.data = part
    return whole


def times(x_ND: Tensor, weight: Tensor) -> Tensor:
    """x [N, D] times weight [O, D] transposed."""
    return linear.linear(x_ND, weight) if linear.chosen() else torch.mm(x_ND, weight.t())


def add_times(total_NO: Tensor, x_ND: Tensor, weight: Tensor) -> Tensor:
    """total + x times weight transposed; changes `total`."""
    return total_NO.add_(linear.linear(x_ND, weight)) if linear.chosen() else total_NO.addmm_(x_ND, weight.t())


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square."""
    inverse = torch.linalg.vecdot(x, x).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse[..., None]


def convolution(x_NC: Tensor, window_NCJ: Tensor, taps_CJ: Tensor) -> Tensor:
    """silu of the causal depthwise convolution at one token, [N, C]; the window moves on by it, in place."""
    columns = window_NCJ.unbind(-1)
    taps = taps_CJ.unbind(-1)
    out = x_NC * taps[-1]
    for column, tap in zip(columns[1:], taps[:-1], strict=True):
        out.addcmul_(column, tap)
    for column, later in zip(columns, (*columns[1:], x_NC), strict=False):
        column.copy_(later)
    return nn.functional.silu(out, inplace=True)


def delta_rule(query_key: Tensor, value_NHV: Tensor, decay_NH: Tensor, beta_NH: Tensor, state_NHKV: Tensor) -> Tensor:
    """S <- decay S + k d^T with d = beta (v - decay S^T k); returns S^T q / sqrt K, [N, H, V]. `state` is changed in
    place.

    query_key: [N, 2, heads, K], not of unit length yet; each key head serves H / heads value heads.
    """
    rows, _, heads, size = query_key.shape
    inverse = torch.linalg.vecdot(query_key, query_key).add_(_EPS).rsqrt_()
    inverse[:, 0].mul_(size**-0.5)
    pair = (query_key * inverse[..., None]).transpose(1, 2)  # [N, heads, 2, K]
    count = value_NHV.shape[1]
    if count != heads:
        pair = pair.repeat_interleave(count // heads, dim=1)
    pair = pair.reshape(rows * count, 2, size)
    state = state_NHKV.view(rows * count, size, -1)
    decay = decay_NH.reshape(-1, 1, 1)
    seen = torch.bmm(pair, state).mul_(decay)
    query, key = pair.unbind(1)
    delta = (value_NHV.reshape(rows * count, -1) - seen[:, 1]).mul_(beta_NH.reshape(-1, 1))
    out = torch.addcmul(seen[:, 0], delta, torch.linalg.vecdot(query, key)[:, None])
    state.mul_(decay).addcmul_(key[:, :, None], delta[:, None, :])
    return out.view(rows, count, -1)


@dataclass
class Step:
    """Where the attention layers of one decoding step read and write."""

    columns: Tensor
    """int64 [N]: the position that each row writes"""
    span: int
    """columns that the longest row uses, the new one included"""

    def __post_init__(self) -> None:
        ahead = torch.arange(self.span) > self.columns[:, None]
        self._bias = torch.zeros(ahead.shape).masked_fill_(ahead, float("-inf"))
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, heads: int, length: int) -> tuple[Tensor, Tensor]:
        """(flat places of the new keys in [S, G, L], int64 [N * G]; what is added to scores, [N * G, 1, span])"""
        if (heads, length) not in self._places:
            rows = len(self.columns)
            starts = torch.arange(0, rows * heads * length, length).view(rows, heads)
            bias = self._bias[:, None].expand(rows, heads, self.span).reshape(rows * heads, 1, self.span)
            self._places[heads, length] = (starts + self.columns[:, None]).view(-1), bias
        return self._places[heads, length]


def attention(
    query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float
) -> Tensor:
    """Attention of a token over its row and itself, [N, H, D]. Keys and values [S, G, L, D] get the new ones."""
    rows, heads, size = query_NHD.shape
    groups, length = keys.shape[1:3]
    places, bias = step.of(groups, length)
    seen = []
    for held, new in ((keys, key_NGD), (values, value_NGD)):
        held.view(-1, size).index_copy_(0, places, new.reshape(-1, size))
        seen.append(held.view(-1, length, size)[: rows * groups, : step.span])
    query = query_NHD.reshape(rows * groups, heads // groups, size)
    scores = torch.baddbmm(bias, query, seen[0].transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), seen[1]).view(rows, heads, size)


def rotate(x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Turns the first R of D by the angle of the position, in place: halves of R belong together."""
    turned = x_NHD[..., : cos_NR.shape[-1]]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat((second.neg(), first), dim=-1)
    turned.mul_(cos_NR[:, None]).addcmul_(other, sin_NR[:, None])
    return x_NHD


class Angles:
    """Cosines and sines of positions, computed once for each position by the model's own rotary embedding."""

    def __init__(self, embedding: Any):
        self._embedding = embedding
        self._cos = self._sin = torch.zeros(0, 0)

    def at(self, columns_N: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """[N, R] each; `span` is over every position."""
        if span > len(self._cos):
            positions = torch.arange(2 * span)[None]
            cos, sin = self._embedding(torch.zeros(1), positions)
            self._cos, self._sin = cos[0], sin[0]
        return self._cos.index_select(0, columns_N), self._sin.index_select(0, columns_N)
