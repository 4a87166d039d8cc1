"""LoRA on a GPU: `python -m pytest -m gpu tests/test_lora_gpu.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import LORA, PACKED, drawn, masters_of
from training_tools import divided, make_trainer, recipe, save_model, uneven_groups

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.process.layout import Split
from astracli.training import parity, setup
from astracli.training.fsdp import Ranks
from astracli.training.step import Trainer
from astracli.weights.device.merging import merge
from astracli.weights.format.digest import bits_of
from astracli.weights.format.low_rank import merged_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), std=0.05, **SIZES)


def on_gpu(model_dir: Path, **split: Any) -> Trainer:
    chosen = recipe(lora=LORA, train=PACKED | {"parity_tolerance": 100.0}, algorithm={"kl_coef": 0.01})
    ranks = Ranks(device=torch.device("cuda", 0))
    return setup.build_trainer(model_dir, ADAPTER, chosen, ranks, attention="sdpa", split=Split(**split))


@pytest.mark.parametrize("pinned", [False, True])
def test_merging_gives_the_bits_of_the_cpu(pinned: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(700, 900, generator=draw)).bfloat16()
    a_RI, b_OR = torch.randn(16, 900, generator=draw), 1e-3 * torch.randn(700, 16, generator=draw)
    there = base.pin_memory() if pinned else base.cuda()
    out = torch.empty(700, 900, dtype=torch.bfloat16, device="cuda")
    merge(there, a_RI.cuda(), b_OR.cuda(), out)
    expected = merged_bits(bits_of(base), a_RI.numpy(), b_OR.numpy())
    assert (bits_of(out.cpu()) == expected).all() and (expected != bits_of(base)).mean() > 0.1


@pytest.mark.parametrize("reference", ["gpu", "host"])
def test_a_step_with_its_checks_and_what_is_published(model_dir: Path, reference: str) -> None:
    trainer = on_gpu(model_dir, reference=reference)
    drawn(trainer)
    metrics = trainer.train(uneven_groups(0), 0, 0).metrics
    assert metrics["rows_gradient_error"] < 0.05 and metrics["kl"] > 0
    trainer.to_host()
    trainer.to_device()
    published = trainer.masters.wire_full()
    for target in masters_of(trainer).adapters.targets:
        base = bits_of(target.base.cpu())
        b_OR = target.b_OR.detach() * masters_of(trainer).adapters.scale
        expected = merged_bits(base, target.a_RI.detach().cpu().numpy(), b_OR.cpu().numpy())
        assert (bits_of(published[target.name]) == expected).all(), target.name


def test_gradients_are_those_of_a_cpu(model_dir: Path) -> None:
    gpu, cpu = on_gpu(model_dir), make_trainer(model_dir, recipe(lora=LORA, train=PACKED))
    for trainer in (gpu, cpu):
        drawn(trainer)
        micro = divided(trainer, uneven_groups(1)).minibatches[0][0]
        parity.logprobs(trainer.policy, trainer.adapter, micro, trainer.ranks.device)[0].sum().backward()
    there, here = gpu.masters.grads.found(), cpu.masters.grads.found()
    assert there.keys() == here.keys()
    for name, gradient in here.items():
        assert (there[name].cpu() - gradient).norm() < 0.1 * gradient.norm(), name
