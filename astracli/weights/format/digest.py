"""Digest of a tensor's bits: two 64-bit lanes, the same on numpy and torch, CPU and GPU, additive over pieces.

    lane_k = sum over i of  row_k[i >> 14] * column_k[i & 16383] * bits[i]      modulo 2^64

`i` is the position in the flattened tensor and `bits[i]` its raw bits as a *signed* integer of the element's width.
Rows and columns are odd splitmix64 values, so a change of any one element always shows in both lanes, and any other
change is missed by chance alone. The product form needs one table of 16384 numbers a lane and no hashing per element:
a dot product per row, which is what makes a check of every version affordable. It is a check against mistakes and
damage, not against someone who forges weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Union

import numpy as np

if TYPE_CHECKING:
    import torch

Lanes = tuple[int, int]
ZERO: Lanes = (0, 0)

_SHIFT = 14
_BLOCK = 1 << _SHIFT
_MASK = (1 << 64) - 1
COLUMN_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # digits of pi
ROW_SEEDS = (0xA4093822299F31D0, 0x082EFA98EC4E6C89)
_TORCH_ROWS = 1 << 10  # rows of a chunk on a GPU: 16 M elements, 128 MiB a temporary


def splitmix64(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint64 -> uint64: the finaliser of splitmix64 after one golden-ratio step."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _odd(seed: int, start: int, count: int) -> np.ndarray[Any, Any]:
    at = np.arange(start, start + count, dtype=np.uint64)
    return splitmix64(splitmix64(at) ^ np.uint64(seed)) | np.uint64(1)


@lru_cache(maxsize=1)
def _columns() -> np.ndarray[Any, Any]:
    """uint64 [2, 16384]"""
    return np.stack([_odd(seed, 0, _BLOCK) for seed in COLUMN_SEEDS])


@lru_cache(maxsize=8)
def torch_columns(device: str) -> torch.Tensor:
    """int64 [2, 16384]"""
    import torch

    return torch.from_numpy(_columns().view(np.int64)).to(device)


@lru_cache(maxsize=8)
def torch_rows(device: str, count: int) -> torch.Tensor:
    """int64 [2, count]: the factors of the first rows."""
    import torch

    return torch.from_numpy(np.stack([_odd(seed, 0, count) for seed in ROW_SEEDS]).view(np.int64)).to(device)


def digest_bits(bits: np.ndarray[Any, Any], start: int = 0) -> Lanes:
    """Lanes of a flat array of 2- or 4-byte elements that lies at `start` of its flattened tensor."""
    signed = bits.view(f"<i{bits.itemsize}")
    columns, buffer = _columns(), np.empty(_BLOCK, np.int64)
    first, last = start >> _SHIFT, (start + len(bits) - 1) >> _SHIFT
    rows = [_odd(seed, first, last - first + 1).tolist() if len(bits) else [] for seed in ROW_SEEDS]
    lanes = [0, 0]
    at = 0
    for k in range(len(rows[0])):
        column = (start + at) & (_BLOCK - 1)
        width = min(_BLOCK - column, len(bits) - at)
        row = buffer[:width]
        np.copyto(row, signed[at : at + width])
        for lane in (0, 1):
            dot = int(np.einsum("i,i->", row.view(np.uint64), columns[lane, column : column + width]))
            lanes[lane] += dot * rows[lane][k]
        at += width
    return lanes[0] & _MASK, lanes[1] & _MASK


def digest_torch(flat: torch.Tensor, start: int = 0) -> Lanes:
    """`digest_bits` in torch operations, on the tensor's own device: many passes, in bounded memory; the form that
    `kernels.DigestPlan` is tested against."""
    import torch

    signed = flat.view(_signed_dtype(flat)).reshape(-1)
    columns = torch_columns(str(flat.device))
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    at = 0
    while at < len(signed):
        column, row = (start + at) & (_BLOCK - 1), (start + at) >> _SHIFT
        left = len(signed) - at
        if column or left < _BLOCK:
            count, width = 1, min(_BLOCK - column, left)
        else:
            count, width = min(left >> _SHIFT, _TORCH_ROWS), _BLOCK
        block = signed[at : at + count * width].view(count, width).long()
        for lane, seed in enumerate(ROW_SEEDS):
            rows = torch.from_numpy(_odd(seed, row, count).view(np.int64)).to(flat.device)
            dots = (block * columns[lane, column : column + width]).sum(1)
            total[lane] += (dots * rows).sum()
        at += count * width
    return lanes_of(total[None])[0]


def lanes_of(sums: torch.Tensor) -> list[Lanes]:
    """int64 [n, 2] -> n pairs; one copy to the host."""
    return [(one & _MASK, two & _MASK) for one, two in sums.tolist()]


def digest_many(ranges: Sequence[tuple[torch.Tensor, int]]) -> list[Lanes]:
    """Lanes of flat tensors, each at its start in its flattened whole; on a GPU in one pass over all of them."""
    if ranges and ranges[0][0].device.type == "cuda" and find_spec("triton"):
        from astracli.weights.device.scatter_kernels import DigestPlan

        return DigestPlan(ranges, range(len(ranges))).lanes()
    return [digest_tensor(flat, start) for flat, start in ranges]


Pending = Union[Lanes, "torch.Tensor"]
"""Lanes, or int64 [1, 2] on a device, not waited for."""


def pending(tensor: torch.Tensor) -> Pending:
    """The digest of a whole contiguous tensor, under way on a GPU; its memory may be used again behind this."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "cuda" and len(flat) and find_spec("triton"):
        from astracli.weights.device.scatter_kernels import DigestPlan

        return DigestPlan([(flat, 0)], [0]).launch()
    return digest_tensor(flat)


def settle(found: Sequence[Pending]) -> list[Lanes]:
    """The lanes of several pending digests, with one wait for the device."""
    waiting = [sums for sums in found if not isinstance(sums, tuple)]
    if not waiting:
        return [lanes for lanes in found if isinstance(lanes, tuple)]
    import torch

    arrived = iter(lanes_of(torch.cat(waiting)))
    return [found_one if isinstance(found_one, tuple) else next(arrived) for found_one in found]


def digest_tensor(tensor: torch.Tensor, start: int = 0) -> Lanes:
    """Lanes of one contiguous tensor on any device."""
    flat = tensor.detach().reshape(-1)
    return digest_bits(bits_of(flat), start) if flat.device.type == "cpu" else digest_torch(flat, start)


def add(one: Lanes, two: Lanes) -> Lanes:
    """Lanes of two pieces together."""
    return (one[0] + two[0]) & _MASK, (one[1] + two[1]) & _MASK


def to_hex(lanes: Lanes) -> str:
    """32 hexadecimal digits, lane 0 first."""
    return f"{lanes[0]:016x}{lanes[1]:016x}"


def from_hex(text: str) -> Lanes:
    """The inverse of `to_hex`. Raises ValueError."""
    if len(text) != 32:
        raise ValueError(f"a digest of {len(text)} digits")
    return int(text[:16], 16), int(text[16:], 16)


def _signed_dtype(tensor: torch.Tensor) -> torch.dtype:
    import torch

    sizes = {2: torch.int16, 4: torch.int32}
    if tensor.element_size() not in sizes:
        raise ValueError(f"weights of {tensor.dtype} do not travel; bfloat16, float16 and float32 do")
    return sizes[tensor.element_size()]


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint16 or uint32 [numel]: a flat numpy view of a contiguous CPU tensor, sharing its memory."""
    flat = tensor.detach().view(-1).view(_signed_dtype(tensor)).numpy()
    return flat.view(f"<u{flat.itemsize}")
