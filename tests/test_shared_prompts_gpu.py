"""Shared prompts through the kernels of a GPU: attention, delta rule and convolution, and a trainer that proves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packing_gpu import relative, save
from training_tools import recipe, sample_groups

from astracli.adapters import qwen3_5_shared
from astracli.adapters.qwen3_5 import ADAPTER
from astracli.kernels import shared_attention, varlen
from astracli.kernels.gpu.fused import chunks, fla
from astracli.kernels.shared_rows import SharedRow
from astracli.models import registry
from astracli.training import fsdp, setup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LENGTHS = (300, 1, 70, 150, 40, 1, 2, 65, 200, 130, 3)
PARENTS = (-1, -1, -1, 0, 0, 1, 1, 1, 2, -1, -1)
TOKENS = sum(LENGTHS)
BOUNDS = np.cumsum([0, *LENGTHS])


def row_on(device: str) -> SharedRow:
    return SharedRow.of(BOUNDS, np.array(PARENTS), torch.device(device))


@pytest.fixture(scope="module")
def ranks() -> Any:
    joined = fsdp.join("cuda")
    yield joined
    joined.close()


@pytest.mark.parametrize(("head_size", "kv_heads"), [(64, 4), (128, 2), (256, 1)])
def test_flash_attention_over_a_prompt_is_plain_attention(head_size: int, kv_heads: int) -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(1, count, TOKENS, head_size, device="cuda", generator=draw).bfloat16().requires_grad_()

    given = [heads(4), heads(kv_heads), heads(kv_heads)]
    pull = torch.randn(1, TOKENS, 4, head_size, device="cuda", generator=draw)
    assert varlen.flash_runs(given[0].device, torch.bfloat16, head_size)
    options = varlen.boundaries(BOUNDS, given[0].device, np.array(PARENTS))
    out, _ = varlen.attention(torch.nn.Identity(), *given, None, **options)
    found = torch.autograd.grad((out * pull).sum(), given)
    exact = [x.detach().double().requires_grad_() for x in given]
    plain = shared_attention.PlainKernel(row_on("cuda"), head_size**-0.5, None)
    tokens = (x.squeeze(0).transpose(0, 1) for x in exact)
    wanted = shared_attention.Attention.apply(*tokens, plain, varlen.one_launch())[None]
    assert relative(out, wanted) < 5e-3
    for mine, theirs in zip(found, torch.autograd.grad((wanted * pull).sum(), exact), strict=True):
        assert relative(mine, theirs) < 1e-2
    with varlen.one_order():
        again = [
            torch.autograd.grad((varlen.attention(torch.nn.Identity(), *given, None, **options)[0] * pull).sum(), given)
            for _ in range(2)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.skipif(fla() is None, reason="flash-linear-attention is not installed")
def test_fla_goes_on_from_the_state_of_a_prompt() -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, TOKENS, *shape, device="cuda", generator=draw)

    leaves = {name: normal(4, 128).bfloat16() for name in ("q", "k", "v")}
    leaves["g"] = -torch.nn.functional.softplus(normal(4) - 3.0)
    leaves["beta"] = normal(4).sigmoid().bfloat16()
    pull = normal(4, 128)
    torch.backends.cuda.matmul.allow_tf32 = False

    def run(rule: Callable[..., torch.Tensor], given: dict[str, torch.Tensor], *more: Any) -> list[torch.Tensor]:
        given = {name: x.detach().requires_grad_() for name, x in given.items()}
        out = rule(given, row_on("cuda"), *more)
        return [out, *torch.autograd.grad((out * pull).sum(), list(given.values()))]

    found = run(qwen3_5_shared.rule_by_fla, leaves, fla())
    wanted = run(qwen3_5_shared.rule_by_torch, {name: x.float() for name, x in leaves.items()})
    assert relative(found[0], wanted[0]) < 1e-2
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert relative(mine, theirs) < 1.5e-2
    # the gradient through the state is most of a prompt's: 300 tokens, 190 behind them
    assert wanted[2][:, :300].norm() > 0


@pytest.mark.skipif(fla() is None, reason="flash-linear-attention is not installed")
def test_fla_convolution_goes_on_from_a_prompt() -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(1, TOKENS, 96, device="cuda", generator=draw).bfloat16()
    taps = torch.randn(96, 4, device="cuda", generator=draw).bfloat16()
    pull = torch.randn(1, TOKENS, 96, device="cuda", generator=draw)
    cu_seqlens = torch.from_numpy(BOUNDS.astype(np.int32)).cuda()
    known = chunks(tuple(BOUNDS.tolist()), x.device)

    def kernel(*given: Any, **options: Any) -> Any:
        return fla().conv(*given, **options, cu_seqlens=cu_seqlens, **known)

    def run(device: str, kind: torch.dtype, conv: Any) -> list[torch.Tensor]:
        given = [t.to(device, kind).requires_grad_() for t in (x, taps)]
        out = qwen3_5_shared.convolution(*given, None, row_on(device), conv)
        return [out, *torch.autograd.grad((out * pull.to(device)).sum(), given)]

    for mine, theirs in zip(run("cuda", torch.bfloat16, kernel), run("cpu", torch.float32, None), strict=True):
        assert relative(mine.cpu(), theirs) < 1e-2


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_trainer_shares_prompts_and_proves_it(tmp_path: Path, ranks: Any, checkpointing: str) -> None:
    model_dir = save(tmp_path / "m")
    table = {"activation_checkpointing": checkpointing, "tokens_per_microbatch": 512, "parity_tolerance": 1e9}
    results = []
    for share in (True, False):
        chosen = recipe(train=table | {"share_prompts": share, "minibatches": 1})
        trainer = setup.build_trainer(model_dir, ADAPTER, chosen, ranks, attention="sdpa")
        metrics = trainer.train(sample_groups(None, 8, seed=1), 0, 0).metrics
        print(checkpointing, share, {k: metrics.get(k) for k in ("rows_max_abs", "rows_gradient_error", "grad_norm")})
        assert ("shared_tokens" in metrics) == share and metrics["rows_gradient_error"] < 1e-2
        results.append([metrics[name] for name in ("loss", "grad_norm", "entropy")])
    assert results[0] == pytest.approx(results[1], rel=0.02, abs=1e-3)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_dense_trainer_shares_prompts(tmp_path: Path, ranks: Any, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = registry.get(name)
    assert adapter.tiny_config is not None
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**adapter.tiny_config() | wide)).save_pretrained(tmp_path)
    chosen = recipe(train={"share_prompts": True, "tokens_per_microbatch": 512, "parity_tolerance": 1e9})
    trainer = setup.build_trainer(tmp_path, adapter, chosen, ranks, attention="sdpa")
    metrics = trainer.train(sample_groups(None, 8, seed=1), 0, 0).metrics
    assert metrics["shared_tokens"] > 0 and metrics["rows_gradient_error"] < 1e-2
