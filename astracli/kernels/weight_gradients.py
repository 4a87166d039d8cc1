"""Gradients of weight matrices by matrix products that add to the fp32 accumulators themselves.

Autograd returns the gradient of a weight that is stored in bf16 as a tensor in bf16, which a hook (`gradients`) adds to
the fp32 accumulator: the product writes 2 bytes a parameter, the sum reads those and 4, and writes 4. Here the product
reads and writes the accumulator, 8 bytes instead of 12, and nothing is rounded to bf16 on the way. The functions below
give autograd no gradient for such a weight. Other uses of it still go to the hook, which adds to the same accumulator.

A frozen weight with an adapter (`LowRank`) takes the same way: its gradient is never made, only those of the two
factors.

Shape letters: N rows of a product, O outputs, I inputs, V vocabulary, D hidden size, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from astracli.kernels.cpu import linear as cpu

_ATTRIBUTE = "gradient_sum"


class Accumulator:
    """One weight's place in the sums of `gradients.Gradients`: made by the first product after they were cleared."""

    def __init__(self, sums: dict[str, Tensor], name: str):
        self._sums = sums
        self._name = name

    def total(self, weight: Tensor) -> Tensor:
        """The fp32 sum, zeros where nothing was added yet."""
        if self._name not in self._sums:
            self._sums[self._name] = torch.zeros_like(weight, dtype=torch.float32)
        return self._sums[self._name]

    def add_product(self, left_NO: Tensor, right_NI: Tensor) -> None:
        """sum [O, I] += left^T right"""
        if self._name in self._sums:
            add_product(self._sums[self._name], left_NO, right_NI)
        else:
            self._sums[self._name] = product(left_NO, right_NI)


class LowRank:
    """The place of a frozen weight's gradient G [O, I], where the weight holds W + scale * B A: G goes into the sums of
    the factors, scale * G A^T for B and scale * B^T G for A, by products that never make G."""

    def __init__(self, sums: dict[str, Tensor], a: tuple[str, nn.Parameter], b: tuple[str, nn.Parameter], scale: float):
        """`a` [R, I], `b` [O, R]: names in the sums, and fp32 parameters."""
        self._sum_a, self._sum_b = Accumulator(sums, a[0]), Accumulator(sums, b[0])
        self.factors = a[1], b[1]
        self._scale = scale

    def add_product(self, left_NO: Tensor, right_NI: Tensor) -> None:
        """G += left^T right"""
        a_RI, b_OR = ((factor.detach() * self._scale).to(right_NI.dtype) for factor in self.factors)
        self._sum_b.add_product(left_NO, right_NI @ a_RI.t())
        self._sum_a.add_product(left_NO @ b_OR, right_NI)


Sum = Accumulator | LowRank


def product(left_NO: Tensor, right_NI: Tensor) -> Tensor:
    """left^T right in fp32 [O, I]."""
    if left_NO.is_cuda and left_NO.dtype != torch.float32:
        return torch.mm(left_NO.t(), right_NI, out_dtype=torch.float32)
    return left_NO.t().float() @ right_NI.float()


def add_product(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    """total (fp32) += left^T right, added up inside the product."""
    if left_NO.is_cuda and left_NO.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total_OI, left_NO.t(), right_NI, torch.float32, out=total_OI)
    else:
        total_OI.addmm_(left_NO.t().float(), right_NI.float())


def of(weight: Tensor | None) -> Accumulator | None:
    """The accumulator of a weight, when it has one and a gradient is asked for now."""
    if weight is None or not weight.requires_grad or not torch.is_grad_enabled():
        return None
    return getattr(weight, _ATTRIBUTE, None)


def install(model: nn.Module, parameters: Mapping[str, nn.Parameter], sums: dict[str, Tensor]) -> int:
    """Give every matrix among the trained parameters an accumulator, and let the model's plain linear layers and
    embeddings add to it. Code that computes with a weight itself asks `of`. Returns how many layers add this way.

    A layer whose forward was replaced by something else stays as it is, and so do its gradients.
    """
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            setattr(parameter, _ATTRIBUTE, Accumulator(sums, name))
    served: list[Any] = [m for m in model.modules() if "forward" not in vars(m) and _plain(m)]
    for module in served:
        module.forward = partial(_linear_forward if type(module) is nn.Linear else _embedding_forward, module)
    return len(served)


def _plain(module: Any) -> bool:
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) is nn.Linear


def adapt(layer: nn.Linear, place: LowRank) -> None:
    """Let a linear layer whose frozen weight holds a merged adapter give its gradient to the adapter's factors."""
    setattr(layer, _ATTRIBUTE, place)  # on the layer: where ranks share a weight, a pass sees another tensor
    forward: Any = partial(_linear_forward, layer)
    layer.forward = forward  # type: ignore[method-assign]


def _of_layer(layer: Any) -> Sum | None:
    """Where the gradient of a layer's weight goes, when it is asked for now and not autograd's business."""
    adapter: LowRank | None = vars(layer).get(_ATTRIBUTE)
    return adapter if adapter is not None and torch.is_grad_enabled() else of(layer.weight)


def served(layer: Any) -> Sum | None:
    """The accumulator of a linear layer's weight; None when other code computes with that weight."""
    own = getattr(vars(layer).get("forward"), "func", None) is _linear_forward
    return _of_layer(layer) if own and not layer._forward_hooks and not layer._forward_pre_hooks else None


def anchors(sums: Iterable[Sum]) -> list[nn.Parameter]:
    """What a function takes besides its frozen weights, so that autograd calls its backward pass."""
    return [factor for place in sums if isinstance(place, LowRank) for factor in place.factors]


def _linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    place = _of_layer(module)
    if place is None:
        return _output(x, module.weight, module.bias)
    (result,) = _Linears.apply(x, [place], [module.bias], module.weight, module.bias, *anchors([place]))
    return result


def _output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and not x.is_cuda and cpu.chosen():
        return cpu.linear(x, weight)
    return nn.functional.linear(x, weight, bias)


def linears(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """Linear layers of one input: their outputs. Where all are served, the gradient of the input is added up inside
    the products too."""
    sums = [place for layer in layers if (place := served(layer)) is not None]
    if len(sums) < len(layers):
        return [layer(x) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return list(_Linears.apply(x, sums, biases, *weights, *biases, *anchors(sums)))


class _Linears(torch.autograd.Function):
    """(x [..., I], accumulators, biases, weights [O, I], biases [O] or None, `anchors`) -> outputs [..., O].

    `accumulators` ride along, not looked up in the backward pass: there a checkpointed block's weights are unpacked as
    other tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: list[Sum], biases: list[Tensor | None], *tensors: Any) -> Any:
        weights = tensors[: len(sums)]
        ctx.save_for_backward(x, *weights)
        ctx.sums = sums
        return tuple(_output(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        x_NI = x.reshape(-1, x.shape[-1])
        grads_NO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        d_x = input_gradient(grads_NO, weights).view_as(x) if ctx.needs_input_grad[0] else None
        for total, grad_NO in zip(ctx.sums, grads_NO, strict=True):
            total.add_product(grad_NO, x_NI)
        wanted = ctx.needs_input_grad[3 + len(weights) : 3 + 2 * len(weights)]
        d_biases = [grad.sum(0) if asked else None for grad, asked in zip(grads_NO, wanted, strict=True)]
        others = len(ctx.needs_input_grad) - 3 - 2 * len(weights)
        return d_x, None, None, *([None] * len(weights)), *d_biases, *([None] * others)


def input_gradient(grads_NO: Sequence[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """The sum of grad @ weight [N, I]: every product adds to the one before, which is rounded to the dtype."""
    total: Tensor | None = None
    for grad_NO, weight_OI in zip(grads_NO, weights, strict=True):
        total = _output(grad_NO, weight_OI.t(), None) if total is None else total.addmm_(grad_NO, weight_OI)
    assert total is not None
    return total


def _embedding_forward(module: nn.Embedding, tokens: Tensor) -> Tensor:
    if (total := of(module.weight)) is None:
        return nn.functional.embedding(tokens, module.weight, module.padding_idx)
    rows: Tensor = _Embedding.apply(tokens, total, module.padding_idx, module.weight)
    return rows


class _Embedding(torch.autograd.Function):
    """(tokens [...], accumulator, token without a gradient or None, weight [V, D]) -> [..., D]. Autograd's own gradient
    is as large as the weight; this touches the rows of these tokens."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, total: Accumulator, padding: int | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.total, ctx.padding = total, padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        tokens, weight = ctx.saved_tensors
        tokens_N = tokens.reshape(-1)
        grad_ND = grads[0].reshape(-1, grads[0].shape[-1]).float()
        if ctx.padding is not None:
            grad_ND = grad_ND.masked_fill((tokens_N == ctx.padding)[:, None], 0.0)
        # not `index_add_`: on a GPU it adds in any order
        ctx.total.total(weight).index_put_((tokens_N,), grad_ND, accumulate=True)
        return None, None, None, None


class GatedMlp(torch.autograd.Function):
    """(x [..., I], silu(gate) * up, its gradients, three accumulators, weights of gate, up and down, `anchors`) ->
    [..., I].

    `fwd(gate, up)` -> product; `fwdbwd(gate, up, grad)` -> (d gate, d up, product): the product is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fwd: Any, fwdbwd: Any, sums: Any, gate: Any, up: Any, down: Any, *anchors: Any
    ) -> Tensor:
        left, right = nn.functional.linear(x, gate), nn.functional.linear(x, up)
        ctx.save_for_backward(x, left, right, gate, up, down)
        ctx.fwdbwd, ctx.sums = fwdbwd, sums
        return nn.functional.linear(fwd(left, right), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, left, right, gate, up, down = ctx.saved_tensors
        x_NI = x.reshape(-1, x.shape[-1])
        grad_NI = grads[0].reshape(-1, grads[0].shape[-1])
        of_gate, of_up, of_down = ctx.sums
        d_left, d_right, made = ctx.fwdbwd(left, right, (grad_NI @ down).view_as(left))
        of_down.add_product(grad_NI, made.reshape(-1, made.shape[-1]))
        del made
        d_left, d_right = (d.reshape(-1, d.shape[-1]) for d in (d_left, d_right))
        of_gate.add_product(d_left, x_NI)
        of_up.add_product(d_right, x_NI)
        d_x = input_gradient((d_left, d_right), (gate, up)).view_as(x) if ctx.needs_input_grad[0] else None
        return d_x, *([None] * (len(ctx.needs_input_grad) - 1))


class GatedProduct(torch.autograd.Function):
    """(gate, up, the two functions of `GatedMlp`) -> silu(gate) * up: for an MLP of which some layers have no sum."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, fwd: Any, fwdbwd: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.fwdbwd = fwdbwd
        product: Tensor = fwd(gate, up)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_gate, d_up, _ = ctx.fwdbwd(*ctx.saved_tensors, grads[0])
        return d_gate, d_up, None, None
