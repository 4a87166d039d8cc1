"""fp32 matrix products through oneDNN, which uses the whole vector width on every x86 CPU.

torch's own `linear` goes to MKL, which on AMD CPUs with AVX-512 reaches less than half of that (95 against 230
GFLOP/s on one core of an AMD EPYC, 1920 x 128 x 384). All three products of training go the same way: output, input
gradient and weight gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST_ROWS = 16
"""Below, the call costs more than the product."""


def available() -> bool:
    """Whether this torch has the operator, and the CPU is one that it was measured on: x86."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N], without a gradient. Any strides."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    """(x [..., K], weight [N, K]) -> [..., N]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = product(grad.view(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]).t())
        return d_x, d_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` for fp32 on a CPU."""
    few = x.numel() < _FEWEST_ROWS * x.shape[-1]
    if few or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return nn.functional.linear(x, weight)
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(x, weight)
        return result
    return product(x, weight)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight)


def install(model: nn.Module) -> int:
    """Let the model's plain linear layers without bias compute this way. Returns how many do."""
    if not available():
        return 0
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and m.bias is None]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)
