"""A micro-batch on a GPU asks for its kernels without ever waiting for one: shown without a GPU, on tensors that have
no memory (`bench/trainer/launches.py`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from training_tools import divided

from astracli.adapters.qwen3_5 import ADAPTER, tiny_config
from astracli.config.algorithms import installed
from astracli.kernels import upload
from astracli.kernels.gpu import fused
from astracli.training import objective, scoring, sums
from astracli.training.fsdp import Ranks
from astracli.training.scoring import Work
from astracli.training.step import Trainer

LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 300}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "trainer" / "launches.py"
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["launches"] = module
    spec.loader.exec_module(module)
    return module


def config(**changed: Any) -> Mapping[str, Any]:
    return tiny_config() | LAYERS | changed


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("algorithm", sorted(set(installed()) - {"distill"}))  # it needs a teacher's figures as well
def test_no_micro_batch_waits_for_the_gpu(bench: ModuleType, algorithm: str, checkpointing: str) -> None:
    """With the loss, the figures and the accumulation of gradients."""
    chosen = bench.recipe(512, checkpointing, algorithm)
    count, phases = bench.micro_batches(ADAPTER, config(), chosen)
    assert count.waits == []
    assert len(phases) >= 2 and all(min(phase.values()) > 50 for phase in phases)
    assert count.calls["fla rule, backward"] == len(phases)
    assert count.calls["fla rule"] == len(phases) * (2 if checkpointing == "full" else 1)


def test_nor_does_the_pass_without_gradients(bench: ModuleType) -> None:
    chosen = bench.recipe(512, "none", "m2po")
    with bench.one_gpu(bench.Count()):
        trainer: Trainer = bench.build(ADAPTER, config(), chosen)
        batch = divided(trainer, bench.groups(512))
        count, work = bench.Count(), Work(batch, 1, sums.Timer(trainer.ranks.device))
        never = SimpleNamespace(prepare=lambda *_: None)
        with (
            mock.patch.object(Ranks, "gather", lambda self, tensor: tensor),
            mock.patch.object(trainer, "algorithm", never),
            count,
        ):
            scoring.score_policy(trainer, work, work.micros, set())
    assert count.waits == [] and len(work.proximals) == sum(map(len, batch.minibatches)) >= 2
    part = sum(int((m.version_N == 1).sum()) for minibatch in batch.minibatches for m in minibatch)
    assert 0 < work.sums.own.tokens == part < batch.loss_tokens


def test_a_wait_would_be_noticed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = bench.recipe(512, "none", "m2po")
    plain = lambda array, device: torch.from_numpy(array).to(device)  # noqa: E731
    monkeypatch.setattr(objective, "upload", plain)
    count, phases = bench.micro_batches(ADAPTER, config(), chosen)
    assert len(count.waits) == 3 * len(phases), "what the loss needs of a micro-batch"
    monkeypatch.setattr(objective, "upload", upload.upload)
    monkeypatch.setattr(sums.Sums, "add", lambda self, name, values: float(values.sum()))
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        bench.micro_batches(ADAPTER, config(), chosen)


def test_a_gated_delta_net_layer_costs_what_it_must(bench: ModuleType) -> None:
    """At 4B: 32 heads of values to 16 of keys. Seven products, two residual sums, the decay, fla's seven calls."""
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    chosen = bench.recipe(512, "none", "m2po")
    one, two = (
        bench.micro_batches(
            ADAPTER, config(num_hidden_layers=n, layer_types=["linear_attention"] * n, **heads), chosen
        )[1][-1]
        for n in (1, 2)
    )
    assert two["forward"] - one["forward"] <= 28
    assert two["backward"] - one["backward"] <= 45


def test_the_chunks_of_segments_are_those_that_fla_counts() -> None:
    """As `fla.ops.utils.index.prepare_chunk_indices` makes them, from lengths that it reads back from the GPU."""
    cu_seqlens_host = (0, 1, 64, 128, 193, 512)
    made = fused.chunks(cu_seqlens_host, torch.device("cpu"))
    lengths = torch.diff(torch.tensor(cu_seqlens_host))
    indices = torch.cat([torch.arange(n) for n in ((lengths + 63) // 64).tolist()])
    theirs = torch.stack([indices.eq(0).cumsum(0) - 1, indices], 1)
    assert made["chunk_indices"].dtype == torch.int32 and torch.equal(made["chunk_indices"].long(), theirs)
    assert made["cu_seqlens_cpu"].tolist() == list(cu_seqlens_host)
    assert fused.chunks(cu_seqlens_host, torch.device("cpu")) is made, "the same tensors for every layer"


def test_the_scale_of_a_norm_is_fp32_without_a_copy_of_its_weight() -> None:
    weight = torch.nn.Parameter(torch.randn(50).bfloat16())
    module = SimpleNamespace(weight=weight, eps=1e-6)
    with mock.patch.object(fused, "fla", lambda: SimpleNamespace(rms_norm=lambda x, scale, bias, eps: scale)):
        scale = fused._norm(module, 1.0, torch.ones(3, 50))
    assert scale.dtype == torch.float32 and torch.equal(scale, weight.float() + 1.0)
    scale.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16 and torch.equal(weight.grad, torch.ones(50))


def test_phases_on_a_gpu_are_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks for everything at once; the device comes to the ends of the phases later."""
    ends = iter([0.0, 30.0, 100.0, 130.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.waited = False

        def record(self) -> None:
            self.at = next(ends)

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = sums.Timer(torch.device("cuda"))
    for phase in ("forward_s", "backward_s", "forward_s"):
        timer.lap(phase)
    assert timer.seconds() == pytest.approx({"forward_s": 0.06, "backward_s": 0.07})
    assert timer.laps[-1][1].waited


def test_sums_are_read_once_and_are_those_of_all_micro_batches() -> None:
    added = sums.Sums()
    assert added.read() == [0.0] * len(sums.Sums.NAMES)
    for part in np.split(np.arange(12, dtype=np.float32), 3):
        added.add("loss", torch.from_numpy(part))
        added.add("ratio", torch.tensor(0.5))
    assert dict(zip(sums.Sums.NAMES, added.read(), strict=True)) == {
        "ratio": 1.5, "entropy": 0.0, "kl": 0.0, "teacher": 0.0, "loss": 66.0, "clipped": 0.0, "capped": 0.0,
        "mismatched": 0.0,
    }  # fmt: skip
