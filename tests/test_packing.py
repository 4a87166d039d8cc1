"""Packed rows: the division, and the same logits, log-probabilities and gradients as every sample alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_tools import make_trainer, recipe, sample_groups, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.backends import choice as backend
from astracli.errors import UserError
from astracli.kernels import varlen
from astracli.models import registry
from astracli.models.adapter import ModelAdapter
from astracli.rl.batch import build_batch, pad_rows
from astracli.rl.rows import Row, rows_of
from astracli.rl.types import Segment
from astracli.training import fsdp, packing
from astracli.training.logprob import PolicyModel

LENGTHS = (37, 90, 5, 70, 1)
FAMILIES = ["qwen3_5", "qwen3", "llama"]
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def tiny(name: str, *, cpu: bool = True, **changed: Any) -> tuple[ModelAdapter, Any]:
    """A random model with logits of a standard deviation near 1, as the trainer prepares it."""
    adapter = registry.get(name)
    torch.manual_seed(0)
    document = adapter.tiny_config() if adapter.tiny_config is not None else dict(GPT2)
    config = AutoConfig.for_model(**document | {"initializer_range": 0.15} | changed)
    model = AutoModelForCausalLM.from_config(config).eval()
    if cpu and adapter.prepare_cpu is not None:
        adapter.prepare_cpu(model)
    return adapter, model


def gradients(model: Any, output: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    pull = torch.randn(output.shape, generator=draw)
    return torch.cat([g.flatten() for g in torch.autograd.grad((output * pull).sum(), list(model.parameters()))])


def packed_inputs(rows: list[torch.Tensor]) -> dict[str, Any]:
    bounds = np.cumsum([0, *map(len, rows)])
    positions = torch.from_numpy(packing.positions(bounds))[None]
    return {"input_ids": torch.cat(rows)[None], "position_ids": positions, "use_cache": False} | varlen.boundaries(
        bounds, torch.device("cpu")
    )


@pytest.mark.parametrize("name", [*FAMILIES, "generic"])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_packed_row_equals_its_samples(name: str, prepared: bool) -> None:
    adapter, model = tiny(name, cpu=prepared)
    # rows of other shapes round otherwise, by the processor; transformers' own delta rule does by more
    close = 1e-4 if prepared else 2e-4
    rows = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    wanted = gradients(model, alone)
    varlen.install(model, adapter)
    inputs = packed_inputs(rows)
    packed = model(**inputs).logits[0]
    assert (packed - alone).abs().max() <= close
    assert (gradients(model, packed) - wanted).norm() <= close * wanted.norm()
    leaked = model(**inputs | varlen.boundaries(np.array([0, sum(LENGTHS)]), torch.device("cpu"))).logits[0]
    assert (leaked - alone).abs().max() > 0.5
    plain = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = model(plain, use_cache=False).logits
    for i, row in enumerate(rows):  # ordinary rows, padded on the right, still work
        assert (padded[i, : len(row)] - alone[sum(LENGTHS[:i]) : sum(LENGTHS[: i + 1])]).abs().max() <= close


def test_a_sliding_window_holds_inside_every_segment() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **registry.get("llama").tiny_config()  # type: ignore[misc]
        | {"model_type": "mistral", "sliding_window": 8, "initializer_range": 0.15, "architectures": None}
    )
    model = AutoModelForCausalLM.from_config(config)
    rows = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 7, 21)]
    with torch.no_grad():
        alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
        varlen.install(model, registry.get("generic"))
        assert (model(**packed_inputs(rows)).logits[0] - alone).abs().max() <= 2e-5


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_the_size_of_a_mask_is_ever_made(name: str) -> None:
    """A row of T tokens in segments of at most 64: no tensor of T x T, no logits of T x vocabulary."""
    adapter, model = tiny(name, vocab_size=3000)
    varlen.install(model, adapter)
    rows = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (64, 50) * 9]
    inputs = packed_inputs(rows)
    tokens = inputs["input_ids"].shape[1]
    predict = torch.arange(tokens - 1)
    policy = PolicyModel(model, chunk=64)
    with Largest() as watch:
        boundaries = {"cu_seqlens": inputs["cu_seqlens"], "max_seqlen": inputs["max_seqlen"]}
        logprob_N, _ = policy(
            inputs["input_ids"], None, inputs["position_ids"], predict, inputs["input_ids"][0, 1:], **boundaries
        )
        logprob_N.sum().backward()
    assert tokens > 1000
    assert watch.elements <= max(64 * 3000, 4 * tokens * 128)  # a chunk of logits; the widest activation
    assert watch.elements < tokens * tokens


def groups_as_rows(seed: int = 0, count: int = 6) -> list[Row]:
    return rows_of(sample_groups(None, count, seed=seed), recipe().algorithm, recipe().rollout)


def test_rows_are_packed_within_the_budget() -> None:
    rows = groups_as_rows()
    micros = packing.micro_batches(rows, 64, 0)
    total = sum(map(len, rows))
    assert sorted(r.index for m in micros for r in m.rows) == [r.index for r in rows]
    assert all(m.tokens_BL.shape == (1, sum(map(len, m.rows))) and m.tokens_BL.size <= 64 for m in micros)
    assert len(micros) <= -(-total // 64) + 1  # nearly full rows
    for micro in micros:
        assert micro.bounds_S1 is not None and micro.bounds_S1[-1] == micro.tokens_BL.size
        flat = micro.tokens_BL[0]
        assert (flat[micro.predict_N + 1] == micro.target_N).all()
        for row, start in zip(micro.rows, micro.bounds_S1, strict=False):
            assert (flat[start : start + len(row)] == row.tokens).all()
    assert [m.rows for m in packing.micro_batches(rows[::-1], 64, 0)] == [m.rows for m in micros]
    alone = packing.micro_batches(rows, 4, 0)
    assert len(alone) == len(rows)  # a sample over the budget travels alone


def test_rows_are_as_few_as_can_be_and_then_even() -> None:
    group = sample_groups(None, 1, seed=0, size=4)[0]
    group.prompt_tokens = np.array([3], np.int32)
    for sample, tokens in zip(group.samples, (4, 8, 1, 4), strict=True):
        sample.segments[0] = Segment(0, np.full(tokens, 5, np.int32), np.zeros(tokens, np.float32))
    rows = rows_of([group], recipe().algorithm, recipe().rollout)
    assert [len(row) for row in rows] == [5, 9, 2, 5]
    # 9 alone, 5 and 5; the 2 fits beside either
    micros = packing.micro_batches(rows, 12, 0)
    assert [[row.index for row in micro.rows] for micro in micros] == [[1, 2], [0, 3]]


def test_no_row_is_left_short_and_a_full_division_stays() -> None:
    class Sized:
        def __init__(self, index: int, length: int):
            self.index, self.length = index, length

        def __len__(self) -> int:
            return self.length

    def lengths(*of: int, most: int) -> list[list[int]]:
        rows: Any = [Sized(i, n) for i, n in enumerate(of)]
        with mock.patch.object(packing, "pack_rows", lambda found: [len(row) for row in found]):
            divided: Any = packing.micro_batches(rows, most, 0)
        return list(divided)

    assert [sum(x) for x in lengths(4, 4, 4, 4, 4, 4, 2, most=12)] == [10, 8, 8], "not 12, 12 and 2"
    # each into the emptier, [5, 4] and [5, 3, 3]: over a budget of 10, so the full rows stay
    assert lengths(5, 5, 4, 3, 3, most=10) == [[5, 5], [4, 3, 3]]
    assert lengths(30, 4, 4, most=10) == [[30], [4, 4]], "over the budget, alone"


def test_positions_restart() -> None:
    assert packing.positions(np.array([0, 3, 4, 6])).tolist() == [0, 1, 2, 0, 0, 1]


def test_who_packs() -> None:
    hybrid = replace(ADAPTER, install_varlen=None)

    def chosen(device: str, adapter: ModelAdapter = ADAPTER, **train: Any) -> str:
        return backend.packing(recipe(train=train), adapter, device)[0]

    assert (chosen("cuda"), chosen("cpu")) == ("packed", "padded")
    assert (chosen("cuda", packing="padded"), chosen("cpu", packing="packed")) == ("padded", "packed")
    assert chosen("cuda", hybrid) == chosen("cuda", attention="flash_attention_2") == "padded"
    with pytest.raises(UserError, match="cannot reset its recurrent state"):
        chosen("cuda", hybrid, packing="packed")
    with pytest.raises(UserError, match="attention = eager"):
        chosen("cpu", packing="packed", attention="eager")


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_packed_training_is_padded_training(model_dir: Path, checkpointing: str) -> None:
    results = []
    for layout in ("padded", "packed"):
        chosen = recipe(
            train={"packing": layout, "activation_checkpointing": checkpointing}, algorithm={"kl_coef": 0.01}
        )
        trainer = make_trainer(model_dir, chosen)
        assert trainer.packed == (layout == "packed")
        figures = []
        for step in range(2):
            result = trainer.train(sample_groups(trainer, 4, seed=step, version=step), step, step)
            assert all((m.bounds_S1 is not None) == trainer.packed for mini in result.batch.minibatches for m in mini)
            figures.append([result.metrics[k] for k in ("loss", "grad_norm", "entropy", "kl", "ratio_mean")])
        results.append((figures, trainer.masters.values))
    assert np.allclose(results[1][0], results[0][0], rtol=2e-3, atol=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=2e-5, rtol=0.0, msg=name)


def test_every_rank_gets_the_same_number_of_packed_rows() -> None:
    groups = sample_groups(None, 5, seed=3)
    counts = []
    for rank in range(3):
        batch = build_batch(
            groups,
            recipe(train={"tokens_per_microbatch": 48}),
            step=0,
            rank=rank,
            world_size=3,
            divide_rows=packing.micro_batches,
        )
        counts.append([len(m) for m in batch.minibatches])
    assert counts[0] == counts[1] == counts[2]


class Counted(TorchDispatchMode):
    """Calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_selective_recomputation_computes_half_of_the_blocks_again() -> None:
    calls = {}
    for mode in ("none", "selective", "full"):
        adapter, model = tiny("qwen3_5", cpu=False)
        varlen.install(model, adapter)
        fsdp.recompute(model, adapter.block_classes(model), mode)
        rows = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
        with Counted() as counted:
            model.model(**packed_inputs(rows)).last_hidden_state.sum().backward()
        calls[mode] = counted.calls["aten.mm.default"] + counted.calls["aten.addmm.default"]
    assert calls["none"] < calls["selective"] < calls["full"]
    assert (
        len([m for m in model.modules() if type(m).__name__ == "CheckpointWrapper"]) == model.config.num_hidden_layers
    )


@pytest.mark.parametrize("packed", [True, False])
def test_rounded_rows_hold_the_same_loss_tokens(packed: bool) -> None:
    rows = rows_of(sample_groups(None, 3, seed=5), recipe().algorithm, recipe().rollout)
    micro = packing.pack_rows(rows) if packed else pad_rows(rows, 0)
    longer = packing.rounded(micro, 64)
    assert longer.tokens_BL.shape[1] % 64 == 0 and longer.tokens_BL.shape[1] >= micro.tokens_BL.shape[1]
    assert longer.tokens_BL.size > micro.tokens_BL.size  # or the test says nothing
    before, after = micro.tokens_BL.reshape(-1), longer.tokens_BL.reshape(-1)
    assert after[longer.predict_N].tolist() == before[micro.predict_N].tolist()
    assert after[longer.predict_N + 1].tolist() == longer.target_N.tolist()
    assert longer.mask_BL.sum() == micro.mask_BL.sum()
    if packed:
        assert longer.bounds_S1 is not None and micro.bounds_S1 is not None
        assert longer.bounds_S1.tolist() == [*micro.bounds_S1.tolist(), longer.tokens_BL.size]
    assert packing.rounded(longer, 64) is longer
    tokens, room = sum(map(len, rows)), longer.tokens_BL.size + micro.tokens_BL.size
    assert packing.filled([longer, micro]) == {
        "microbatches": 2, "row_tokens": 2 * tokens, "packed_fraction": pytest.approx(2 * tokens / room),
    }  # fmt: skip
