"""Attention of packed rows by hand: its scale, its boundaries, and what it refuses to compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from astracli.errors import RunFailed
from astracli.kernels import varlen


def test_attention_that_packed_rows_do_not_compute_is_refused() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RunFailed, match="asks for softcap"):
        varlen.attention(torch.nn.Identity(), x, x, x, None, softcap=30.0)
    with pytest.raises(RunFailed, match="asks for dropout"):
        varlen.attention(torch.nn.Identity(), x, x, x, None, dropout=0.1)
    with pytest.raises(RunFailed, match="attention that is not causal"):
        varlen.attention(torch.nn.Identity(), x, x, x, None, is_causal=False)
    two, cu_seqlens_host = x.expand(2, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens with 2 rows; a packed row is one"):
        varlen.attention(torch.nn.Identity(), two, two, two, None, cu_seqlens=cu_seqlens_host)


@pytest.mark.parametrize("cu_seqlens_host", [[0, 3], [0, 3, 5], [1, 4], [0, 2, 2, 4], [0, 3, 2, 4]])
def test_boundaries_that_do_not_describe_the_row_are_refused(cu_seqlens_host: list[int]) -> None:
    with pytest.raises(ValueError, match="does not describe one packed row of 4 tokens"):
        varlen.segments(torch.tensor(cu_seqlens_host, dtype=torch.int32), 4)
    assert varlen.segments(torch.tensor([0, 3, 4], dtype=torch.int32), 4) == [(0, 3), (3, 4)]


def test_attention_takes_the_scale_of_the_model() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=draw) for _ in range(3))
    cu_seqlens_host = torch.tensor([0, 2, 5], dtype=torch.int32)
    for cu_seqlens, parts in ((None, [(0, 5)]), (cu_seqlens_host, [(0, 2), (2, 5)])):
        found, _ = varlen.attention(torch.nn.Identity(), query, key, value, None, scaling=0.7, cu_seqlens=cu_seqlens)
        for a, b in parts:
            scores = 0.7 * query[0, :, a:b] @ key[0, :, a:b].transpose(1, 2)
            scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ value[0, :, a:b]
            assert torch.allclose(found[0, a:b].transpose(0, 1), expected, atol=1e-6)


class Told(torch.autograd.Function):
    """Writes down whether its backward pass has to add up in one order."""

    modes: list[bool]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fails: bool) -> torch.Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        Told.modes.append(torch.are_deterministic_algorithms_enabled())
        if ctx.fails:
            raise RuntimeError("a kernel failed")
        return grads[0], None


def test_attention_adds_up_in_one_order_where_it_is_asked_to_and_nothing_else_does() -> None:
    Told.modes = []
    x = torch.ones(3, requires_grad=True)
    varlen.ordered(Told.apply(x, False)).sum().backward()
    with varlen.one_order():
        Told.apply(varlen.ordered(Told.apply(Told.apply(x, False), False)), False).sum().backward()
        assert varlen.ordered(Told.apply(x.detach(), False)).grad_fn is None
    varlen.ordered(Told.apply(x, False)).sum().backward()
    assert Told.modes == [False, False, True, False, False]


def test_the_order_asked_for_ends_with_an_error_too() -> None:
    Told.modes = []
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="a kernel failed"), varlen.one_order():
        varlen.ordered(Told.apply(x, True)).sum().backward()
    assert Told.modes == [True] and not torch.are_deterministic_algorithms_enabled()
    varlen.ordered(Told.apply(x, False)).sum().backward()
    assert Told.modes == [True, False]


def test_both_kinds_of_rows_ask_their_kernel_for_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=draw).requires_grad_() for _ in range(3))
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(varlen, "ordered", lambda out: asked.append(tuple(out.shape)) or out)
    varlen.attention(torch.nn.Identity(), query, key, value, None)
    cu_seqlens_host = torch.tensor([0, 2, 5], dtype=torch.int32)
    varlen.attention(torch.nn.Identity(), query, key, value, None, cu_seqlens=cu_seqlens_host)
    assert asked == [(1, 2, 5, 8), (1, 2, 2, 8), (1, 2, 3, 8)]
