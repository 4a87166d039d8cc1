"""How Qwen3.5's layers compute: quick CPU kernels, padded rows, packed rows, and no GPU kernel on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid import row, tiny_text
from transformers import Qwen3_5ForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from astracli.adapters import qwen3_5, qwen3_5_layers
from astracli.kernels import varlen

LENGTHS = (37, 90, 5, 70)


def gradients_of(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """All gradients of a fixed weighted sum of the logits, as one vector."""
    model.zero_grad()
    weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (logits * weight).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("length", [5, 40, 64, 130])
def test_prepare_cpu_keeps_the_numbers(length: int) -> None:
    plain, quick = tiny_text(), tiny_text()
    qwen3_5.prepare_cpu(quick)
    ids = row(length, batch=3)
    expected, got = (model(ids, use_cache=False).logits for model in (plain, quick))
    assert 0.5 < expected.std() < 2
    # against fp64, each of the two is up to 7e-5 away in logits and 1e-4 in gradients
    assert (got - expected).abs().max() <= 7e-5
    assert relative(gradients_of(quick, got), gradients_of(plain, expected)) <= 7e-5


def test_rows_of_one_chunk_never_reach_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_text(), []
    real = modeling.torch_chunk_gated_delta_rule

    def spy(*args: Any, chunk_size: int = 64, **kwargs: Any) -> Any:
        seen.append(chunk_size)
        return real(*args, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", spy)
    qwen3_5.prepare_cpu(model)
    model(row(64), use_cache=False)
    assert seen == []
    model(row(70), use_cache=False)
    assert seen == [64] * 3


def test_right_padding_without_a_mask_is_exact() -> None:
    model = tiny_text()
    qwen3_5.prepare_cpu(model)
    short = row(9)
    padded = torch.cat([short, torch.zeros(1, 30, dtype=torch.long)], dim=1)
    assert qwen3_5.ADAPTER.attention_mask(padded != 0) is None
    with torch.no_grad():
        assert (model(padded).logits[:, :9] - model(short).logits).abs().max() <= 5e-6


@pytest.mark.skipif(
    not hasattr(modeling, "FusedRMSNormGated"),
    reason="this transformers dispatches by wrapped functions: test_packing.py",
)
def test_gpu_kernels_that_are_installed_are_never_used_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_text()
    source.save_pretrained(tmp_path)
    ids = row(17)
    with torch.no_grad():
        expected = source(ids).logits

    def no_driver(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("0 active drivers")

    for name in qwen3_5.GPU_KERNELS:
        monkeypatch.setattr(modeling, name, no_driver)
    with pytest.raises((RuntimeError, AssertionError)):
        Qwen3_5ForCausalLM(source.config)  # asks for a current CUDA device
    model = qwen3_5.load(tmp_path)
    assert modeling.chunk_gated_delta_rule is no_driver  # put back
    qwen3_5.prepare_cpu(model)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() <= 5e-6
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 20)


def packed_inputs(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = [r.shape[1] for r in rows]
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cpu_kernels", [False, True])
def test_a_packed_row_equals_separate_rows(recompute: bool, cpu_kernels: bool) -> None:
    model = tiny_text(hidden_size=64).train()
    if cpu_kernels:
        qwen3_5.prepare_cpu(model)
    rows = [row(n, seed=n) for n in LENGTHS]
    separate = torch.cat([model(r, use_cache=False).logits for r in rows], dim=1)
    reference = gradients_of(model, separate)
    leaked = model(**{k: v for k, v in packed_inputs(rows).items() if "seqlen" not in k}, use_cache=False).logits
    varlen.install(model, qwen3_5.ADAPTER)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = model(**packed_inputs(rows), use_cache=False).logits
    # rows of other shapes round otherwise: by up to 2e-5 on an AMD EPYC, 3.5e-5 on a Xeon with AMX; transformers' own
    # delta rule, which the one for packed rows is not, by more
    close = 1e-4 if cpu_kernels else 2e-4
    assert (packed - separate).abs().max() <= close
    assert relative(gradients_of(model, packed), reference) <= close
    assert (leaked - separate).abs().max() > 1.0  # what the same row gives without its boundaries
    with torch.no_grad():  # and ordinary rows still work
        assert (model(rows[0], use_cache=False).logits - separate[:, :37]).abs().max() <= close


@pytest.mark.parametrize("recompute", [False, True])
def test_boundaries_reach_a_delta_net_whose_layer_hands_nothing_on(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.8 has it: without `**kwargs`, and called without."""
    net, layer = modeling.Qwen3_5GatedDeltaNet.forward, modeling.Qwen3_5DecoderLayer.forward

    def bare(self: Any, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None) -> Any:
        return net(self, hidden_states, cache_params=cache_params, attention_mask=attention_mask)

    def deaf(self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        own = {} if hasattr(self, "linear_attn") else kwargs
        return layer(self, hidden_states, position_embeddings, attention_mask, **own)

    monkeypatch.setattr(modeling.Qwen3_5GatedDeltaNet, "forward", bare)
    monkeypatch.setattr(modeling.Qwen3_5DecoderLayer, "forward", deaf)
    test_a_packed_row_equals_separate_rows(recompute, cpu_kernels=True)


@pytest.mark.parametrize("name", ["cache_params", "cache"])
def test_a_cache_reaches_transformers_own_forward_by_the_name_it_came_with(name: str) -> None:
    """`cache_params` until transformers 5.23, `cache` since: without it a prefilled prompt would leave no state."""
    given: dict[str, Any] = {}

    def plain(hidden_states: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        return hidden_states

    module = qwen3_5_layers.delta_net_modules(tiny_text())[0]
    held, hidden = object(), torch.zeros(1, 3, 8)
    assert qwen3_5_layers.delta_net(module, plain, True, hidden, **{name: held}) is hidden
    assert given == {"attention_mask": None, name: held}
    with pytest.raises(ValueError, match="takes no cache"):
        qwen3_5_layers.delta_net(module, plain, True, hidden, cu_seqlens=torch.tensor([0, 3]), **{name: held})


def test_boundaries_that_do_not_cover_the_row_are_refused() -> None:
    model = tiny_text()
    varlen.install(model, qwen3_5.ADAPTER)
    with pytest.raises(ValueError, match="does not describe one packed row"):
        model(row(10), cu_seqlens=torch.tensor([0, 4, 9]), max_seqlen=5, use_cache=False)
