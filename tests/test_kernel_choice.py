"""Which kernels a Gated DeltaNet layer takes, and how many configurations of them are tried."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from astracli.adapters import qwen3_5_layers
from astracli.adapters.qwen3_5 import ADAPTER
from astracli.kernels import varlen
from astracli.kernels.gpu import fused


def test_kernels_that_are_wrapped_look_at_the_tensor_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer transformers replace the torch functions where fla is installed; on a CPU the torch one must run."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    def in_torch(query: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return query * scale

    @functools.wraps(in_torch)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", wrapped)
    qwen3_5_layers.torch_on_cpu()
    qwen3_5_layers.torch_on_cpu()
    found = modeling.torch_chunk_gated_delta_rule
    assert found(torch.ones(2), scale=3.0, cu_seqlens=None).tolist() == [3.0, 3.0]
    assert inspect.unwrap(found) is in_torch


def test_kernels_are_tuned_over_few_configurations_and_not_by_row_length() -> None:
    def tuner(warps: list[int], keys: list[str]) -> Any:
        return SimpleNamespace(configs=[SimpleNamespace(num_warps=w) for w in warps], keys=keys)

    many = tuner([1, 2, 4, 8, 16] * 5, ["D", "NB"])
    few, odd = tuner([4, 8], ["H"]), tuner([1, 2, 16], ["NB"])
    wrapped = SimpleNamespace(fn=many)  # heuristics lie around the tuner
    module = SimpleNamespace(a=wrapped, b=few, c=odd, d=len, e=3, f=wrapped)
    assert fused.thin_tuning([module]) == 3
    assert fused.thin_tuning([module]) == 3  # twice is once
    assert (many.keys, few.keys, odd.keys) == (["D"], ["H"], [])
    assert len(many.configs) == 4
    assert {c.num_warps for c in many.configs} == {4, 8}
    assert len(few.configs) == 2 and [c.num_warps for c in odd.configs] == [1, 2, 16]


@pytest.mark.parametrize("packed", [True, False])
def test_a_gpu_whose_fla_has_no_right_backward_runs_the_rule_in_torch(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other kernels stay; a tensor that says it is on a GPU takes them, here with torch inside."""
    from types import SimpleNamespace

    from astracli.adapters import qwen3_5_layers as layers
    from astracli.kernels.cpu import delta_rule
    from astracli.kernels.gpu import fused

    class OnGpu(torch.Tensor):
        is_cuda = property(lambda self: True)  # type: ignore[assignment]

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ADAPTER.tiny_config()))  # type: ignore[misc]
    module = layers.delta_net_modules(model)[0]
    hidden = torch.randn(1, 90, 32, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 37, 42, 90], dtype=torch.int32) if packed else None
    wanted = torch.cat(
        [module(hidden[:, a:b]) for a, b in ((0, 37), (37, 42), (42, 90))] if packed else [module(hidden)], 1
    )

    def conv(x: Any, taps: Any, bias: Any, *, activation: str, cu_seqlens: Any) -> tuple[Any, None]:
        parts = varlen.segments(cu_seqlens, x.shape[1])
        mixed = [delta_rule.conv_silu(x[:, a:b].transpose(1, 2), taps, bias).transpose(1, 2) for a, b in parts]
        return torch.cat(mixed, 1), None

    def norm(x: Any, gate: Any, *_: Any, eps: float) -> Any:
        return module.norm(x.reshape(-1, x.shape[-1]), gate.reshape(-1, x.shape[-1])).reshape(x.shape)

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("incorrect results for gated chunk_bwd_dqkwg")

    monkeypatch.setattr(fused, "fla", lambda: SimpleNamespace(conv=conv, rms_norm_gated=norm, rule=refused))
    row = hidden.as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match="chunk_bwd"):
        layers.delta_net(module, module.forward, False, row, cu_seqlens=bounds)
    monkeypatch.setattr(fused, "delta_rule_by_torch", True)
    found = layers.delta_net(module, module.forward, False, row, cu_seqlens=bounds)
    assert float((found.detach().as_subclass(torch.Tensor) - wanted.detach()).abs().max()) < 1e-5
