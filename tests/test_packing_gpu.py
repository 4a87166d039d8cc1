"""Packed rows on a GPU, `pytest -m gpu tests/test_packing_gpu.py`: flash attention and fla's kernels in bf16 against
every sample alone in fp32 or more, and the trainer's own start-up check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_tools import divided, recipe, sample_groups
from transformers import AutoConfig, AutoModelForCausalLM

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.adapters.qwen3_5_layers import torch_rule
from astracli.kernels import varlen
from astracli.kernels.gpu.fused import chunks, fla
from astracli.models import registry
from astracli.training import fsdp, packing, parity, setup
from astracli.training import logprob as logprob_module
from astracli.training.step import Work
from astracli.training.sums import Timer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (37, 190, 5, 70, 1, 64, 300)


def bounds() -> np.ndarray:
    return np.cumsum([0, *LENGTHS])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("head_size", "kv_heads"), [(64, 4), (128, 2), (256, 1), (256, 4)])
def test_flash_attention_ends_at_every_boundary(head_size: int, kv_heads: int) -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)
    tokens = sum(LENGTHS)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, head_size, device="cuda", generator=draw).bfloat16().requires_grad_()

    q, k, v = heads(4), heads(kv_heads), heads(kv_heads)
    pull = torch.randn(1, tokens, 4, head_size, device="cuda", generator=draw)
    assert varlen.flash_runs(q.device, q.dtype, head_size)
    options = varlen.boundaries(bounds(), q.device)
    out, _ = varlen.attention(torch.nn.Identity(), q, k, v, None, **options)
    found = torch.autograd.grad((out * pull).sum(), [q, k, v])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = [
        varlen.causal_attention(*(x[:, :, a:b] for x in exact), head_size**-0.5, None)
        for a, b in varlen.segments(options["cu_seqlens"], tokens)
    ]
    wanted = torch.cat(parts, dim=2).transpose(1, 2)
    assert relative(out, wanted) < 5e-3
    for mine, theirs in zip(found, torch.autograd.grad((wanted * pull).sum(), exact), strict=True):
        assert relative(mine, theirs) < 1e-2


@pytest.mark.skipif(fla() is None, reason="flash-linear-attention is not installed")
def test_fla_convolution_ends_at_every_boundary() -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)
    tokens, channels = sum(LENGTHS), 96
    x = torch.randn(1, tokens, channels, device="cuda", generator=draw).bfloat16().requires_grad_()
    taps = torch.randn(channels, 4, device="cuda", generator=draw).bfloat16().requires_grad_()
    pull = torch.randn(1, tokens, channels, device="cuda", generator=draw)
    options = varlen.boundaries(bounds(), x.device)
    cu_seqlens, known = options["cu_seqlens"], chunks(options["cu_seqlens_host"], x.device)
    out = fla().conv(x, taps, None, activation="silu", cu_seqlens=cu_seqlens, **known)[0]
    assert torch.equal(out, fla().conv(x, taps, None, activation="silu", cu_seqlens=cu_seqlens)[0])
    found = torch.autograd.grad((out * pull).sum(), [x, taps])
    exact_x, exact_taps = (t.detach().double().requires_grad_() for t in (x, taps))
    parts = []
    for a, b in varlen.segments(cu_seqlens, tokens):
        padded = torch.nn.functional.pad(exact_x[0, a:b].t(), (3, 0))[None]
        mixed = torch.nn.functional.conv1d(padded, exact_taps.unsqueeze(1), groups=channels)
        parts.append(torch.nn.functional.silu(mixed).transpose(1, 2))
    wanted = torch.cat(parts, dim=1)
    assert relative(out, wanted) < 5e-3
    for mine, theirs in zip(found, torch.autograd.grad((wanted * pull).sum(), [exact_x, exact_taps]), strict=True):
        assert relative(mine, theirs) < 1e-2


@pytest.mark.skipif(fla() is None, reason="flash-linear-attention is not installed")
def test_fla_delta_rule_ends_at_every_boundary() -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)
    tokens, heads, size = sum(LENGTHS), 4, 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, device="cuda", generator=draw)

    leaves = [normal(heads, size).bfloat16() for _ in range(3)]
    leaves += [-torch.nn.functional.softplus(normal(heads) - 3.0), normal(heads).sigmoid().bfloat16()]
    leaves = [x.requires_grad_() for x in leaves]
    pull = normal(heads, size)
    boundaries = varlen.boundaries(bounds(), leaves[0].device)
    cu_seqlens, known = boundaries["cu_seqlens"], chunks(boundaries["cu_seqlens_host"], leaves[0].device)

    def run(rule: Any, inputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
        q, k, v, g, beta = inputs
        out: torch.Tensor = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **options)[0]
        return out

    known = {name: value for name, value in known.items() if name in fla().rule_options}
    out = run(fla().rule, leaves, cu_seqlens=cu_seqlens, **known)
    assert torch.equal(out, run(fla().rule, leaves, cu_seqlens=cu_seqlens))
    found = torch.autograd.grad((out * pull).sum(), leaves)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = [run(torch_rule(), [x[:, a:b] for x in exact]) for a, b in varlen.segments(cu_seqlens, tokens)]
    wanted = torch.cat(parts, dim=1)
    assert relative(out, wanted) < 1e-2
    for mine, theirs in zip(found, torch.autograd.grad((wanted * pull).sum(), exact), strict=True):
        assert relative(mine, theirs) < 1.5e-2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_in_bf16_is_the_plain_one(with_bias: bool, temperature: float) -> None:
    """Several chunks and products; fp32 logits from bf16 inputs."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    tokens, size, vocabulary = 700, 128, 5003

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=draw).div(size**0.25).bfloat16().requires_grad_()

    hidden, weight = leaf(tokens, size), leaf(vocabulary, size)
    bias = leaf(vocabulary) if with_bias else None
    target = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=draw)
    pull = torch.randn(tokens, device="cuda", generator=draw)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    logprob, entropy = logprob_module.chunked_logprob(
        hidden, weight, target, bias_V=bias, chunk=64, temperature=temperature
    )
    found = torch.autograd.grad((logprob * pull).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = torch.nn.functional.linear(exact[0], exact[1], exact[2] if with_bias else None)
    plain = (logits / temperature).log_softmax(-1)
    wanted = plain.gather(1, target[:, None])[:, 0]
    assert (logprob - wanted).abs().max() < 1e-3
    assert (entropy + (plain.exp() * plain).sum(-1)).abs().max() < 1e-3
    for mine, theirs in zip(found, torch.autograd.grad((wanted * pull).sum(), exact), strict=True):
        assert relative(mine, theirs) < 1e-2


def test_the_head_of_8k_tokens_costs_chunks_not_8_gigabytes() -> None:
    tokens, size, vocabulary = 8192, 256, 248_320
    hidden = torch.randn(tokens, size, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, size, device="cuda").mul_(0.02).bfloat16().requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunk = logprob_module.chunk_tokens(vocabulary, "cuda")
    logprob, _ = logprob_module.chunked_logprob(hidden, weight, target, chunk=chunk)
    logprob.sum().backward()
    cost = torch.cuda.max_memory_allocated() - before
    print("peak over its inputs:", cost / 2**30, "GiB")
    assert cost < 2.5 * 2**30


@pytest.mark.skipif(fla() is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3", "qwen2", "llama"])
def test_fused_norms_and_mlps_are_the_same_function(name: str) -> None:
    """A layer's norm, its MLP and, where there is one, a head's norm: in bf16 against plain arithmetic in fp64."""
    adapter = registry.get(name)
    assert adapter.tiny_config is not None and adapter.prepare_gpu is not None
    torch.manual_seed(0)
    wide = {"hidden_size": 320, "intermediate_size": 640, "head_dim": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**adapter.tiny_config() | wide)).cuda().bfloat16()
    adapter.prepare_gpu(model)
    layer = next(x for x in model.model.layers if hasattr(x, "self_attn"))
    centre = 1.0 if name == "qwen3_5" else 0.0
    head = getattr(layer.self_attn, "q_norm", None)
    for module in (layer.input_layernorm, layer.mlp, head):
        if module is None:
            continue
        assert "forward" in module.__dict__  # it was replaced
        if module is not layer.mlp:
            torch.nn.init.normal_(module.weight, mean=1.0 - centre, std=0.3)
        x = torch.randn(1, 300, 320, device="cuda").bfloat16()
        if module is head:  # heads are cut out of a wider tensor
            x = torch.randn(1, 300, 4, 128, device="cuda").bfloat16()[..., :64]
        mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
        weights = [p.detach().double().requires_grad_() for p in module.parameters()]
        out = module(mine)
        wanted = plain_mlp(theirs, *weights) if module is layer.mlp else plain_norm(theirs, weights[0] + centre)
        pull = torch.randn_like(wanted)
        assert relative(out, wanted) < 1e-2
        found = torch.autograd.grad((out * pull).sum(), [mine, *module.parameters()])
        for a, b in zip(found, torch.autograd.grad((wanted * pull).sum(), [theirs, *weights]), strict=True):
            assert relative(a, b) < 1.5e-2


def plain_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def plain_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def save(directory: Path, **config: Any) -> Path:
    """A random model with head sizes as GPU kernels want them, otherwise small, and activations that stay near 1."""
    assert ADAPTER.tiny_config is not None
    document = (
        ADAPTER.tiny_config()
        | {
            "initializer_range": 0.06,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [6, 5, 5],
            },
        }
        | config
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**document)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranks() -> Any:
    joined = fsdp.join("cuda")
    yield joined
    joined.close()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_trainer_packs_and_proves_it(tmp_path: Path, ranks: Any, checkpointing: str) -> None:
    model_dir = save(tmp_path / "m")
    table = {"activation_checkpointing": checkpointing, "tokens_per_microbatch": 512, "parity_tolerance": 1e9}
    results = []
    for layout in ("auto", "padded"):
        chosen = recipe(train=table | {"packing": layout})
        trainer = setup.build_trainer(model_dir, ADAPTER, chosen, ranks, attention="sdpa")
        assert trainer.packed == (layout == "auto")
        groups = sample_groups(None, 8, seed=1)
        metrics = trainer.train(groups, 0, 0).metrics
        print(checkpointing, layout, {k: metrics[k] for k in ("rows_max_abs", "rows_gradient_error", "grad_norm")})
        assert metrics["rows_gradient_error"] < (3e-3 if trainer.packed else 1e-2)
        results.append([metrics[name] for name in ("loss", "grad_norm", "entropy")])
    assert results[0] == pytest.approx(results[1], rel=0.02, abs=1e-3)


@pytest.mark.parametrize("layers", [8, 32])
def test_packed_rows_are_separate_rows_bit_for_bit_at_any_depth(tmp_path: Path, ranks: Any, layers: int) -> None:
    """In one shape, and with attention that adds up in one order: only sums over tokens come in another order."""
    chosen = recipe(train={"tokens_per_microbatch": 512, "parity_tolerance": 1e9})
    model_dir = save(tmp_path / "m", num_hidden_layers=layers)
    trainer = setup.build_trainer(model_dir, ADAPTER, chosen, ranks, attention="sdpa")
    rows = parity.spread(divided(trainer, sample_groups(None, 8, seed=1)).rows, 512)
    checked = replace(trainer.row_check, packed=True)

    def error(same_shape: bool) -> float:
        return checked.gradient_error(rows, same_shape=same_shape)

    with torch.no_grad():
        together = checked.logprobs(packing.pack_rows(rows))
        for index in range(len(rows)):
            micro, its = parity.in_the_shape_of_all(rows, index, join=packing.pack_rows, pad_token=0)
            alone = checked.logprobs(micro)
            assert torch.equal(alone[its], together[its])
    found, otherwise = error(True), error(False)
    print(layers, "layers: in one shape", found, "in other shapes", otherwise)
    assert found < 3e-3 and not torch.are_deterministic_algorithms_enabled()
    assert error(True) == pytest.approx(found, rel=1e-3)
    assert checked.gradient_repeat(rows) < 1e-6


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_no_micro_batch_waits_for_the_gpu(
    tmp_path: Path, ranks: Any, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself raises at every wait, after a step that compiles and tunes the kernels."""
    table = {"activation_checkpointing": checkpointing, "tokens_per_microbatch": 512, "minibatches": 1}
    chosen = recipe(train=table | {"parity_tolerance": 1e9})
    trainer = setup.build_trainer(save(tmp_path / "m"), ADAPTER, chosen, ranks, attention="sdpa")
    trainer.train(sample_groups(None, 8, seed=1), 0, 0)
    batch = divided(trainer, sample_groups(None, 8, seed=2, version=1), 1)
    work = Work(batch, 1, Timer(trainer.ranks.device))
    work.first_measured = True
    work.limits = trainer.algorithm.prepare(torch.zeros(0), torch.zeros(0), chosen.algorithm.own)
    monkeypatch.setattr(trainer.masters, "update", lambda step: 0.0)
    monkeypatch.setattr(trainer, "require_agreement", lambda *_: None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.minibatch(work, 0, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_boundaries_that_are_ignored_are_found(tmp_path: Path, ranks: Any) -> None:
    """The same trainer with one boundary too few leaks, and the figure says so."""
    from astracli.errors import RunFailed

    model_dir = save(tmp_path / "m")
    chosen = recipe(train={"tokens_per_microbatch": 512, "parity_tolerance": 1e9})
    trainer = setup.build_trainer(model_dir, ADAPTER, chosen, ranks, attention="sdpa")
    pack = packing.pack_rows

    def forgetful(rows: Any, pad_token: int = 0) -> Any:
        micro = pack(rows, pad_token)
        micro.bounds_S1 = np.array([0, micro.tokens_BL.size])
        return micro

    packing.pack_rows = forgetful  # type: ignore[assignment]
    try:
        with pytest.raises(RunFailed, match="packed in one row differ"):
            trainer.train(sample_groups(None, 8, seed=1), 0, 0)
    finally:
        packing.pack_rows = pack
