"""`format.low_rank` with torch, on the device of the weights: the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from astracli.process.layout import MERGED_TOGETHER
from astracli.weights.format import low_rank

BLOCK = {"cpu": low_rank.BLOCK, "cuda": MERGED_TOGETHER}
"""Elements that are merged together: what that needs beside the weights stays in a cache."""


@torch.no_grad()
def merge(base_OI: Tensor, a_RI: Tensor, b_OR: Tensor, out_OI: Tensor) -> None:
    """out <- base + B A, rounded to the dtype of `base` (bfloat16 or float32). `out` may be wider, and may lie on
    another device than `base`, that of the fp32 factors; B is scaled already."""
    outputs, inputs = base_OI.shape
    step = max(1, BLOCK.get(out_OI.device.type, BLOCK["cpu"]) // inputs)
    space = torch.empty((2, min(step, outputs), inputs), dtype=torch.float32, device=out_OI.device)
    for low in range(0, outputs, step):
        b_nR, rows = b_OR[low : low + step], slice(low, low + step)
        total, product = space[0, : len(b_nR)], space[1, : len(b_nR)]
        torch.mul(b_nR[:, :1], a_RI[0], out=total)
        for k in range(1, len(a_RI)):
            torch.mul(b_nR[:, k : k + 1], a_RI[k], out=product)  # not `addcmul`: it may fuse the two roundings
            total.add_(product)
        here = base_OI[rows].to(
            out_OI.device, non_blocking=True
        )  # as it is: together, torch would widen it on the host
        total.add_(here.float())
        out_OI[rows] = total.to(base_OI.dtype)
