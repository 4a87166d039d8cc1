"""Packed rows: the division, and the same logits, log-probabilities and gradients as every sample alone; what leaks
stops the run."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_tools import make_trainer, recipe, sample_groups, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from astracli import backend, registry
from astracli.adapter import ModelAdapter
from astracli.adapters import qwen3_5_layers
from astracli.adapters.qwen3_5 import ADAPTER
from astracli.errors import RunFailed, UserError
from astracli.gpu import fused
from astracli.rl.batch import Row, build_batch, pad_rows, rows_of
from astracli.rl.types import Segment
from astracli.training import fsdp, packing, parity, varlen
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
    close = 2e-5 if prepared else 2e-4  # transformers' own delta rule rounds otherwise than the one for packed rows
    rows = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    wanted = gradients(model, alone)
    varlen.install(model, adapter)
    inputs = packed_inputs(rows)
    packed = model(**inputs).logits[0]
    assert (packed - alone).abs().max() <= close
    assert (gradients(model, packed) - wanted).norm() <= close * wanted.norm()
    leaked = model(**inputs | {"cu_seqlens": torch.tensor([0, sum(LENGTHS)], dtype=torch.int32)}).logits[0]
    assert (leaked - alone).abs().max() > 0.5
    plain = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padded = model(plain, use_cache=False).logits
    for i, row in enumerate(rows):  # ordinary rows, padded on the right, still work
        assert (padded[i, : len(row)] - alone[sum(LENGTHS[:i]) : sum(LENGTHS[: i + 1])]).abs().max() <= 2e-5


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


def test_a_sample_goes_into_the_fullest_row_that_has_room() -> None:
    group = sample_groups(None, 1, seed=0, size=4)[0]
    group.prompt_tokens = np.array([3], np.int32)
    for sample, tokens in zip(group.samples, (4, 8, 1, 4), strict=True):
        sample.segments[0] = Segment(0, np.full(tokens, 5, np.int32), np.zeros(tokens, np.float32))
    rows = rows_of([group], recipe().algorithm, recipe().rollout)
    assert [len(row) for row in rows] == [5, 9, 2, 5]
    # 9 alone, 5 and 5; the 2 fits beside the 9, too, but fills the other row to its 12 tokens
    micros = packing.micro_batches(rows, 12, 0)
    assert [[row.index for row in micro.rows] for micro in micros] == [[1], [0, 2, 3]]


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


def test_the_check_of_the_start_measures_gradients_too(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe(train={"packing": "packed", "tokens_per_microbatch": 256}))
    metrics = trainer.train(sample_groups(trainer, 4, seed=1), 0, 0).metrics
    assert 0 < metrics["rows_gradient_error"] < 1e-5 and metrics["rows_max_abs"] < 1e-5
    assert "rows_gradient_error" not in trainer.train(sample_groups(trainer, 4, seed=2, version=1), 1, 1).metrics


def without_boundaries(model: Any) -> None:
    """An adapter that forgets them: its recurrent layers see one long row."""
    for layer in model.modules():
        if hasattr(layer, "linear_attn"):
            plain = layer.linear_attn.forward
            layer.linear_attn.forward = lambda *a, plain=plain, **k: plain(
                *a, **{n: v for n, v in k.items() if "seqlen" not in n}
            )


def test_a_leak_is_found_in_log_probabilities_and_in_gradients(model_dir: Path) -> None:
    leaking = replace(ADAPTER, install_varlen=without_boundaries)
    chosen = recipe(train={"packing": "packed", "tokens_per_microbatch": 256})
    trainer = make_trainer(model_dir, chosen, adapter=leaking)
    with pytest.raises(RunFailed, match=r"rows packed in one row differ from separate rows by .* in log-probability"):
        trainer.train(sample_groups(None, 4, seed=1), 0, 0)
    rows = parity.spread(groups_as_rows(), 256)
    error = gradient_error(trainer, rows)
    assert error > 0.1
    with pytest.raises(RunFailed, match=r"in gradient, relative to its norm, allowed 1\.0e-04"):
        parity.require_gradients(error, torch.device("cpu"), leaking, True)
    assert gradient_error(make_trainer(model_dir, chosen), rows) < 1e-5


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_noise_of_rounding_is_a_unit_in_the_last_place_and_no_leak(model_dir: Path, checkpointing: str) -> None:
    chosen = recipe(train={"packing": "packed", "activation_checkpointing": checkpointing})
    trainer = make_trainer(model_dir, chosen)
    rows = parity.spread(groups_as_rows(), 256)
    noise = parity.rounding_noise(trainer.policy, trainer.adapter, rows, trainer.masters, pad_token=0)
    assert 1e-2 < noise < 0.3  # four blocks, each moved by 2^-8
    assert noise == parity.rounding_noise(trainer.policy, trainer.adapter, rows, trainer.masters, pad_token=0)
    assert gradient_error(trainer, rows) < 1e-5  # nothing of it stays


def test_noise_raises_what_is_allowed_on_a_gpu_and_never_to_a_leak() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert parity.gradient_tolerance(cpu, 0.1) == 1e-4
    assert [parity.gradient_tolerance(cuda, n) for n in (0.0, 0.005, 0.05, 3.0)] == [1e-2, 1e-2, 0.05, 0.15]
    parity.require_gradients(0.04, cuda, ADAPTER, True, noise=0.05)
    with pytest.raises(RunFailed, match=r"allowed 1\.5e-01"):
        parity.require_gradients(0.26, cuda, ADAPTER, True, noise=0.9)


def test_ignored_boundaries_are_measured_and_do_not_stop_the_run(model_dir: Path) -> None:
    table = {"packing": "packed", "tokens_per_microbatch": 256, "rows_check_every": 2}
    leaking = make_trainer(model_dir, recipe(train={**table, "row_boundaries": "ignored"}))
    found = [leaking.train(sample_groups(None, 4, seed=s, version=s), s, s).metrics for s in range(3)]
    assert found[0]["rows_gradient_error"] > 0.1 and found[0]["rows_max_abs"] > 0.1
    assert "rows_gradient_error" not in found[1] and found[2]["rows_gradient_error"] > 0.1
    exact = make_trainer(model_dir, recipe(train=table))
    found = [exact.train(sample_groups(exact, 4, seed=s, version=s), s, s).metrics for s in range(3)]
    assert found[2]["rows_gradient_error"] < 1e-4 and found[2]["rows_max_abs"] < 1e-4


def test_ignoring_boundaries_leaves_attention_alone(model_dir: Path) -> None:
    """Only recurrent layers leak: with theirs taken out of the way, both modes are one."""
    leaking = make_trainer(model_dir, recipe(train={"packing": "packed", "row_boundaries": "ignored"}))
    exact = make_trainer(model_dir, recipe(train={"packing": "packed"}))
    row = packing.pack_rows(groups_as_rows()[:4])
    results = []
    for trainer in (leaking, exact):
        for layer in trainer.policy.model.modules():
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.forward = lambda hidden_states, **k: hidden_states * 0.5
        results.append(parity.logprobs(trainer.policy, trainer.adapter, row, torch.device("cpu"))[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "asked"), [("qwen3_5", "padded"), ("llama", "auto")])
def test_boundaries_can_be_ignored_only_where_there_are_some(name: str, asked: str) -> None:
    chosen = recipe(train={"packing": asked, "row_boundaries": "ignored"})
    with pytest.raises(UserError, match=r"train\.row_boundaries = ignored has nothing to leak through"):
        backend.packing(chosen, registry.get(name), "cpu")
    assert backend.packing(recipe(train={"row_boundaries": "ignored"}), ADAPTER, "cpu")[0] == "packed"


def gradient_error(trainer: Any, rows: list[Row]) -> float:
    join: Callable[..., Any] = packing.pack_rows if trainer.packed else pad_rows
    masters = trainer.masters
    error = parity.gradients_against_separate(trainer.policy, trainer.adapter, rows, masters, join=join, pad_token=0)
    assert all(p.grad is None for p in trainer.policy.parameters())
    return error


def test_every_rank_gets_the_same_number_of_packed_rows() -> None:
    groups = sample_groups(None, 5, seed=3)
    counts = []
    for rank in range(3):
        batch = build_batch(
            groups,
            step=0,
            seed=0,
            algorithm=recipe().algorithm,
            minibatches=2,
            tokens_per_microbatch=48,
            rollout=recipe().rollout,
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
    from astracli.cpu import delta_rule
    from astracli.gpu import fused

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
        parts = layers._segments(cu_seqlens, x.shape[1])
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
