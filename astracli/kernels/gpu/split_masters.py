"""An fp32 number as a bf16 one and the 16 bits that rounding lost: Triton kernels for `training/split_masters.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _split(master, high, rest, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(master + at, mask=at < count)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    bits += tl.where((bits & 0xFFFF) == 0x8000, 2 * ((bits >> 16) & 1) - 1, 0)
    top = (bits + 0x8000) >> 16
    tl.store(high + at, top.to(tl.int16), mask=at < count)
    tl.store(rest + at, (bits - (top << 16)).to(tl.int16), mask=at < count)


@triton.jit
def _join(high, rest, master, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(high + at, mask=at < count).to(tl.int32)
    low = tl.load(rest + at, mask=at < count).to(tl.int32)
    tl.store(master + at, (top << 16) + low, mask=at < count)


def split(master: Tensor, high: Tensor, rest: Tensor) -> None:
    """Contiguous tensors of one size: fp32 -> bf16 and int16."""
    grid = (triton.cdiv(master.numel(), _BLOCK),)
    _split[grid](master.view(torch.int32), high.view(torch.int16), rest, master.numel(), BLOCK=_BLOCK)


def join(high: Tensor, rest: Tensor, master: Tensor) -> None:
    """bf16 and int16 -> fp32."""
    grid = (triton.cdiv(master.numel(), _BLOCK),)
    _join[grid](high.view(torch.int16), rest, master.view(torch.int32), master.numel(), BLOCK=_BLOCK)
