"""fp32 matrix products through oneDNN where that is quicker than torch's own `linear`, which goes to MKL.

oneDNN uses the whole vector width on every x86 CPU. MKL reaches less than half of that on some AMD CPUs with AVX-512,
and as much on others. But oneDNN compiles a product for each new shape, which takes as long as the product itself, and
rows of other lengths and other numbers of sequences are ever new shapes. So the two are measured once a process, with
a product that is compiled already, and oneDNN is taken where it is much quicker (`QUICKER`). All three products of
training go the same way: output, input gradient and weight gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST_ROWS = 16
"""Below, the call costs more than the product."""
QUICKER = 1.5
"""How many times the speed of MKL pays for compiling."""
_MEASURED = 384, 128, 384
"""Rows, input and output size of the product that is measured."""


def available() -> bool:
    """Whether this torch has the operator, and the CPU is one that it was measured on: x86."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache
def advantage() -> float:
    """Speed of oneDNN over that of torch's own `linear` here; 0.0 without oneDNN. Takes a few milliseconds, once."""
    if not available():
        return 0.0
    rows, size, out = _MEASURED
    with torch.no_grad():
        x, weight = torch.ones(rows, size), torch.ones(out, size)
        ours, torchs = (_seconds(lambda f=f: f(x, weight)) for f in (product, nn.functional.linear))  # type: ignore[misc]
    return torchs / ours


def _seconds(work: Callable[[], Any], times: int = 7) -> float:
    """The least of some calls, behind one that is not counted: others may use the same core."""
    work()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


decided: bool | None = None
"""What the last `install` of this process found."""


def chosen() -> bool:
    """Whether this process multiplies through oneDNN: what the last `install` decided; before any, where it can."""
    return available() if decided is None else decided


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


def install(model: nn.Module, *, measured: bool = True) -> int:
    """Let the model's plain linear layers without bias compute this way, where that pays. Returns how many do.

    Not `measured`: wherever it is possible, so that numbers depend on no measurement (deterministic runs).
    """
    global decided
    decided = available() and (not measured or advantage() >= QUICKER)
    if not decided:
        return 0
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and m.bias is None]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)
