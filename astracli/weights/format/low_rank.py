"""Merging a low-rank adapter into the weights that it belongs to, bit for bit the same wherever it is done.

    merged[i, j] = round(W[i, j] + sum over k of  B[i, k] * A[k, j])        A [R, I], B [O, R] fp32, B already scaled

in fp32: every product is rounded, the sum begins with the product of k = 0 and takes the others in their order, W is
added last, and the result is rounded once to the dtype of W, to nearest and ties to even. A matrix product would leave
the order, and fused multiply-adds, to the library. So trainer and receiver get one result, and the trainer's digests of
it prove the receiver's. Here with numpy; `device.merging` does the same with torch, on any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 1 << 15
"""Elements that are merged together: what they need stays in a core's cache."""

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bits = np.ndarray[Any, Any]


def merged_bits(base: Bits, a_RI: Floats, b_OR: Floats) -> Bits:
    """The merged weights' bits [O * I], in the dtype of `base`: uint16 (bfloat16) or uint32 (float32), flat."""
    rank, inputs = a_RI.shape
    outputs, step = len(b_OR), max(1, BLOCK // inputs)
    base_OI, out_OI = base.reshape(outputs, inputs), np.empty((outputs, inputs), base.dtype)
    space = np.empty((2, step, inputs), np.float32)
    for low in range(0, outputs, step):
        b_nR = b_OR[low : low + step]
        total, product = space[0, : len(b_nR)], space[1, : len(b_nR)]
        np.multiply(b_nR[:, :1], a_RI[0], out=total)
        for k in range(1, rank):
            np.multiply(b_nR[:, k : k + 1], a_RI[k], out=product)
            np.add(total, product, out=total)
        np.add(widened(base_OI[low : low + step]), total, out=total)
        out_OI[low : low + step] = rounded(total, base.dtype.itemsize)
    return out_OI.reshape(-1)


def widened(bits: Bits) -> Floats:
    """bfloat16 or float32 by its bits -> float32."""
    wide = bits.astype(np.uint32) << np.uint32(16) if bits.dtype.itemsize == 2 else bits
    return wide.view(np.float32)


def rounded(values: Floats, width: int) -> Bits:
    """float32 -> the bits of bfloat16 (`width` 2), to nearest and ties to even, or of float32 (4)."""
    bits = values.view(np.uint32)
    if width == 4:
        return bits
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + up) >> np.uint32(16)).astype("<u2")
