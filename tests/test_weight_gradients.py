"""Products that add to the fp32 accumulators leave what autograd's gradients, summed in fp32, would: on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from astracli.adapters.qwen3_5 import ADAPTER, tiny_config
from astracli.adapters.qwen3_5_layers import install_varlen
from astracli.kernels import weight_gradients
from astracli.kernels.gpu import fused
from astracli.training import fsdp
from astracli.training.gradients import Gradients
from astracli.training.logprob import PolicyModel

TOKENS = 48
LAYERS = {"num_hidden_layers": 4, "vocab_size": 65, "intermediate_size": 61}


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def silu_again(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        made = silu_product(*leaves)
        d_gate, d_up = torch.autograd.grad(made, leaves, grad)
    return d_gate, d_up, made.detach()


def policy_of(dtype: torch.dtype, **config: Any) -> PolicyModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(tiny_config() | LAYERS | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn(parameter.shape)).bfloat16())
    return PolicyModel(model.to(dtype))


def gradients(policy: PolicyModel, *, accumulate: bool, served: bool = False) -> dict[str, Tensor]:
    """Of two micro-batches, which share tokens."""
    parameters = dict(policy.model.named_parameters())
    grads = Gradients(parameters, accumulate=accumulate)
    if served:
        grads.by_products(policy.model)
    for seed in (1, 2):
        drawn = torch.randint(3, 40, (1, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
        weight_N = torch.linspace(0.5, 1.5, TOKENS)
        logprob_N, _ = policy(drawn[:, :-1], None, None, torch.arange(TOKENS), drawn[0, 1:])
        (logprob_N * weight_N).sum().backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in grads.found().items()}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    difference = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted)
    return (difference / sum(float(g.double().square().sum()) for g in wanted.values())) ** 0.5


@pytest.fixture
def fused_mlps() -> Any:
    kernels = SimpleNamespace(swiglu=silu_product, swiglu_again=silu_again)
    with mock.patch.object(fused, "fla", lambda: kernels):
        yield lambda model: fused.install(model, norms=(), mlps=("Qwen3_5MLP",))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_model_has_the_gradients_that_autograd_gives_it(
    fused_mlps: Callable[[Any], None], checkpointing: str, tied: bool
) -> None:
    """In fp32, where the only difference is the order of sums."""
    wanted = gradients(policy_of(torch.float32, tie_word_embeddings=tied), accumulate=False)
    policy = policy_of(torch.float32, tie_word_embeddings=tied)
    fused_mlps(policy.model)
    fsdp.recompute(policy, ADAPTER.block_classes(policy.model), checkpointing)
    install_varlen(policy.model, all_rows=True)
    found = gradients(policy, accumulate=True, served=True)
    assert all(p.grad is None for p in policy.model.parameters())
    assert found.keys() == wanted.keys()
    assert error(found, wanted) < 2e-6
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4), name


def test_in_bf16_they_are_nearer_to_the_gradient_than_rounded_ones(fused_mlps: Callable[[Any], None]) -> None:
    """The layers compute in bf16 either way; what the products add is not rounded."""
    torch.manual_seed(2)
    x_NI, grad_NO = torch.randn(300, 40).bfloat16(), torch.randn(300, 30).bfloat16()
    exact = (grad_NO.double().t() @ x_NI.double()) * 2

    def sum_of_two(served: bool) -> Tensor:
        layer = nn.Linear(40, 30, bias=False).bfloat16()
        grads = Gradients({"w": layer.weight}, accumulate=True)
        if served:
            grads.by_products(layer)
        for _ in range(2):
            (layer(x_NI) * grad_NO).sum().backward()
        return grads.found()["w"]

    served, hooked = ((sum_of_two(s).double() - exact).norm() / exact.norm() for s in (True, False))
    assert served < 1e-6 and 5e-4 < hooked < 5e-3
    policies = policy_of(torch.bfloat16), policy_of(torch.bfloat16)
    fused_mlps(policies[1].model)
    hooked_all = gradients(policies[0], accumulate=True)
    assert error(gradients(policies[1], accumulate=True, served=True), hooked_all) < 0.05


def test_every_large_matrix_is_served_and_no_hook_sees_its_gradient() -> None:
    policy = policy_of(torch.bfloat16)
    install_varlen(policy.model, all_rows=True)
    seen: set[str] = set()
    for name, parameter in policy.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.add(name) if p.grad is not None else None
        )
    parameters = dict(policy.model.named_parameters())
    found = gradients(policy, accumulate=True, served=True)
    assert found.keys() == parameters.keys() and all(g.dtype == torch.float32 for g in found.values())
    assert {name for name, p in parameters.items() if p.dim() == 2}.isdisjoint(seen)
    assert {name for name, p in parameters.items() if p.dim() != 2} == seen


def test_a_weight_used_in_both_ways_and_biases() -> None:
    """The accumulator takes from the product and from the hook; layers of one input add up its gradient."""
    torch.manual_seed(3)
    layers = nn.ModuleList([nn.Linear(6, n, bias=n > 4) for n in (4, 5, 7)]).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        outs = weight_gradients.linears(x, list(layers))
        return sum(out.square().sum() for out in outs) + layers[0].weight.pow(3).sum()

    wanted = torch.autograd.grad(loss(), [x, *layers.parameters()])
    sums: dict[str, Tensor] = {}
    parameters = dict(layers.named_parameters())
    with (
        mock.patch.object(weight_gradients, "product", lambda left, right: left.t() @ right),
        mock.patch.object(weight_gradients, "add_product", lambda total, left, right: total.addmm_(left.t(), right)),
    ):
        assert weight_gradients.install(layers, parameters, sums) == 3
        loss().backward()
    for name, parameter in parameters.items():
        of_autograd = 0 if parameter.grad is None else parameter.grad
        parameter.grad = of_autograd + sums.get(name, 0)
    found = [x.grad, *(p.grad for p in layers.parameters())]
    assert sums.keys() == {"0.weight", "1.weight", "2.weight"}
    torch.testing.assert_close(found, list(wanted))
    with torch.no_grad():
        assert weight_gradients.of(layers[0].weight) is None


def test_a_padding_token_has_no_gradient() -> None:
    table = nn.Embedding(9, 4, padding_idx=2).bfloat16()
    sums: dict[str, Tensor] = {}
    weight_gradients.install(table, {"e": table.weight}, sums)
    grad = torch.randn(2, 4, 4).bfloat16()
    tokens = torch.tensor([[1, 2, 1, 5], [8, 1, 2, 2]])
    (table(tokens) * grad).sum().backward()
    wanted = torch.zeros(9, 4).index_add_(0, tokens.flatten(), grad.flatten(0, 1).float())
    wanted[2] = 0
    torch.testing.assert_close(sums["e"], wanted)
    assert table.weight.grad is None


def test_a_layer_whose_forward_was_replaced_or_is_watched_is_asked_itself() -> None:
    layers: Any = nn.ModuleList([nn.Linear(4, 3, bias=False) for _ in range(3)]).bfloat16()
    weight_gradients.install(layers, dict(layers.named_parameters()), {})
    assert all(weight_gradients.served(layer) is not None for layer in layers)
    seen: list[Any] = []
    layers[0].forward = lambda x: torch.zeros(2, 3)
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.ones(2, 4).bfloat16()
    found = weight_gradients.linears(x, list(layers))
    assert seen == [1] and not found[0].any() and found[2].any()
    assert [weight_gradients.served(layer) is None for layer in layers] == [True, True, False]


def test_what_something_else_computes_stays_with_autograd() -> None:
    """A layer whose forward was replaced, and an embedding that counts its tokens."""
    model = nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Linear(4, 3)).bfloat16()
    layer: Any = model[1]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    assert weight_gradients.install(model, dict(model.named_parameters()), sums := {}) == 0
    model(torch.tensor([1, 1])).sum().backward()
    assert not sums and all(m.weight.grad is not None for m in model)  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 77, 512])
def test_on_a_gpu_the_product_adds_in_fp32(rows: int) -> None:
    torch.manual_seed(4)
    layer = nn.Linear(320, 200, bias=False, device="cuda", dtype=torch.bfloat16)
    sums: dict[str, Tensor] = {}
    weight_gradients.install(layer, {"w": layer.weight}, sums)
    wanted = torch.zeros(200, 320, dtype=torch.float64, device="cuda")
    for _ in range(3):
        x = torch.randn(1, rows, 320, device="cuda").bfloat16().requires_grad_()
        pull = torch.randn(1, rows, 200, device="cuda").bfloat16()
        layer(x).backward(pull)
        wanted += pull[0].double().t() @ x[0].double()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert (sums["w"].double() - wanted).norm() / wanted.norm() < 1e-5
