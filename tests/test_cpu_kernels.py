"""The CPU kernels against plain torch formulations in fp64: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from astracli.kernels.cpu import delta_rule, linear, memory, norms


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of a fixed weighting of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weighting = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin()
    return out.detach(), list(torch.autograd.grad((out * weighting).sum(), leaves))


def agree(quick: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], bound: float) -> None:
    """`quick` in fp32 is within `bound` (relative, largest value) of `exact` in fp64, gradients too."""
    out, grads = gradients(quick, inputs)
    want, want_grads = gradients(exact, [x.double() for x in inputs])
    for got, expected in zip([out, *grads], [want, *want_grads], strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert (got - expected).abs().max() <= bound * max(1e-2, expected.abs().max())
    assert want.abs().max() > 1e-2


def step_by_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The recurrence itself: S <- e^g S + k (beta (v - e^g S^T k))^T, out = S^T q."""
    unit = [x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k)]
    q, k = unit[0] * q.shape[-1] ** -0.5, unit[1]
    state = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3])
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        delta = (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1)


def delta_inputs(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    q, k = torch.randn(3, length, 2, 8), torch.randn(3, length, 2, 8)
    v, g, beta = torch.randn(3, length, 2, 6), -torch.rand(3, length, 2), torch.rand(3, length, 2)
    return [q, k, v, g, beta]


def quick_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
    return delta_rule.rule(
        modeling.torch_chunk_gated_delta_rule, 64, q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **options
    )


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_delta_rule_of_one_chunk_is_the_recurrence(length: int) -> None:
    agree(lambda *x: quick_rule(*x)[0], step_by_step, delta_inputs(length), 2e-5)


@torch.no_grad()
def test_last_state_is_the_references() -> None:
    inputs = delta_inputs(20)
    out, state = quick_rule(*inputs, output_final_state=True)
    names = dict(zip(("query", "key", "value", "g", "beta"), inputs, strict=True))
    want, want_state = modeling.torch_chunk_gated_delta_rule(
        **names, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert (out - want).abs().max() <= 1e-5
    assert state.shape == want_state.shape and (state - want_state).abs().max() <= 1e-5
    assert quick_rule(*inputs)[1] is None


def test_a_state_to_begin_with_goes_to_the_reference() -> None:
    inputs = delta_inputs(20)
    start = torch.randn(3, 2, 8, 6)
    halves = [[x[:, :12] for x in inputs], [x[:, 12:] for x in inputs]]
    with torch.no_grad():
        whole = quick_rule(*inputs, initial_state=start)[0]
        first, state = quick_rule(*halves[0], initial_state=start, output_final_state=True)
        second, _ = quick_rule(*halves[1], initial_state=state)
    assert (torch.cat([first, second], 1) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 3, 10])
def test_convolution(length: int) -> None:
    torch.manual_seed(length)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        mixed = nn.functional.conv1d(x, weight.unsqueeze(1), padding=weight.shape[1] - 1, groups=len(weight))
        return nn.functional.silu(mixed[..., : x.shape[-1]])

    inputs = [torch.randn(2, 6, length), torch.randn(6, 4)]
    out, grads = gradients(lambda x, w: delta_rule.conv_silu(x, w, None), inputs)
    want, want_grads = gradients(exact, [x.double() for x in inputs])
    for got, expected in zip([out, *grads], [want, *want_grads], strict=True):
        assert (got - expected).abs().max() <= 1e-5


def test_norms() -> None:
    torch.manual_seed(0)
    x, gate, scale = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16)

    def exact(x: Tensor, scale: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    agree(lambda x, s: norms.rms_norm(x, s, 1e-6), exact, [x, scale], 1e-5)
    agree(
        lambda x, z, s: norms.gated_rms_norm(x, z, s, 1e-6),
        lambda x, z, s: exact(x, s) * nn.functional.silu(z),
        [x, gate, scale],
        1e-5,
    )


@pytest.mark.skipif(not linear.available(), reason="this torch has no oneDNN products")
def test_linear() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 3))
    assert linear.install(model, measured=False) == 1  # the one with a bias stays
    for rows in (2, 64):  # below and above the size that pays
        agree(linear.linear, nn.functional.linear, [torch.randn(rows, 5, 24), torch.randn(40, 24)], 1e-5)
    x = torch.randn(64, 24)
    with torch.no_grad():
        assert (model[0](x) - nn.functional.linear(x, model[0].weight)).abs().max() <= 1e-5
        strided = torch.randn(24, 64).t()
        assert (linear.linear(strided, model[0].weight) - strided @ model[0].weight.t()).abs().max() <= 1e-5


@pytest.mark.skipif(not linear.available(), reason="this torch has no oneDNN products")
def test_products_go_through_onednn_only_where_it_is_much_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.advantage() > 0.1  # measured: both have computed something
    monkeypatch.setattr(linear, "decided", None)  # put back at the end
    for quicker, layers in ((2.4, 1), (1.1, 0)):
        monkeypatch.setattr(linear, "advantage", lambda quicker=quicker: quicker)
        model = nn.Sequential(nn.Linear(24, 40, bias=False))
        assert linear.install(model) == layers
        assert linear.chosen() is bool(layers)
        assert linear.install(model, measured=False) == 1  # a deterministic run asks no clock


def test_freed_memory_can_be_kept_twice() -> None:
    assert memory.keep_freed_memory() is memory.keep_freed_memory()
