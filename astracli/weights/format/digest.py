"""Digest of a tensor's bits: two 64-bit lanes, the same on numpy and torch, CPU and GPU, additive over pieces.

    lane_k = sum over i of  row_k[i >> 14] * column_k[i & 16383] * bits[i]      modulo 2^64

`i` is the position in the flattened tensor and `bits[i]` its raw bits as a *signed* integer of the element's width.
Rows and columns are odd splitmix64 values, so a change of any one element always shows in both lanes, and any other
change is missed by chance alone. The product form needs one table of 16384 numbers a lane and no hashing per element:
a dot product per row, which is what makes a check of every version affordable. It is a check against mistakes and
damage, not against someone who forges weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

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


def lanes_of(sums: torch.Tensor) -> list[Lanes]:
    """int64 [n, 2] -> n pairs; one copy to the host."""
    return [(one & _MASK, two & _MASK) for one, two in sums.tolist()]


def digest_tensor(tensor: torch.Tensor, start: int = 0) -> Lanes:
    """Lanes of a contiguous tensor that begins at element `start` of its flattened whole. A GPU's is copied to the
    host: for many tensors there, `device.scatter_kernels.DigestPlan` is the quick way."""
    return digest_bits(bits_of(tensor.cpu()), start)


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


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """uint16 or uint32 [numel]: a flat numpy view of a contiguous CPU tensor, sharing its memory."""
    import torch

    sizes = {2: torch.int16, 4: torch.int32}
    if tensor.element_size() not in sizes:
        raise ValueError(f"weights of {tensor.dtype} do not travel; bfloat16, float16 and float32 do")
    flat = tensor.detach().view(-1).view(sizes[tensor.element_size()]).numpy()
    return flat.view(f"<u{flat.itemsize}")
