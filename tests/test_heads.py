"""Heads cut and turned by hand give what autograd gives for the same function."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from astracli.kernels.gpu import heads


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_cutting_heads(times: int, dtype: torch.dtype) -> None:
    """Bit for bit in bf16 too: a sum of two is rounded once, as of three."""
    torch.manual_seed(0)
    key_heads, size, value_size = 2, 4, 6
    width, values = key_heads * size, key_heads * times * value_size

    def plain(mixed: Tensor) -> list[Tensor]:
        query, key, value = mixed.split([width, width, values], dim=-1)
        parts = [x.reshape(2, 5, -1, size).repeat_interleave(times, dim=2) for x in (query, key)]
        return [*parts, value.reshape(2, 5, -1, value_size)]

    mixed = torch.randn(2, 5, 2 * width + values).to(dtype)
    mine, theirs = mixed.clone().requires_grad_(), mixed.clone().requires_grad_()
    found = heads.SplitHeads.apply(mine, width, size, value_size, times)
    wanted = plain(theirs)
    assert all(x.is_contiguous() for x in found)
    torch.testing.assert_close(list(found), wanted, rtol=0, atol=0)
    pulls = [torch.randn_like(x) for x in wanted]
    torch.autograd.backward(list(found), pulls)
    torch.autograd.backward(wanted, pulls)
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rotated", [8, 4])
def test_turning_is_what_transformers_computes(rotated: int, dtype: torch.dtype) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    torch.manual_seed(1)
    queries, keys = (torch.randn(1, 7, n, 8).to(dtype) for n in (4, 2))
    angles = torch.randn(1, 7, rotated // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    outcomes = []
    for function in (heads.rotate, inspect.unwrap(modeling.apply_rotary_pos_emb)):
        leaves = [x.clone().requires_grad_() for x in (queries, keys)]
        turned = function(*(x.transpose(1, 2) for x in leaves), cos, sin)
        (turned[0].square().sum() + (turned[1] * 3).sum()).backward()
        outcomes.append([*turned, *(x.grad for x in leaves)])
    exact = dtype == torch.float64
    torch.testing.assert_close(outcomes[0][:2], outcomes[1][:2], rtol=0, atol=1e-15 if exact else 0)
    torch.testing.assert_close(outcomes[0][2:], outcomes[1][2:], rtol=1e-12 if exact else 2e-2, atol=1e-2)
