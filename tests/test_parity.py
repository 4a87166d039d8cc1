"""The check at a run's start: a leak through packed rows is found and told from rounding; a recipe may ask for one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import groups_as_rows
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.adapters.qwen3_5 import ADAPTER
from astracli.backends import choice as backend
from astracli.errors import RunFailed, UserError
from astracli.kernels import varlen
from astracli.models import registry
from astracli.rl.batch import pad_rows
from astracli.rl.rows import Row
from astracli.training import packing, parity


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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
        trainer.row_check.require({"rows_gradient_error": error})
    assert gradient_error(make_trainer(model_dir, chosen), rows) < 1e-5
    # and as a GPU computes each alone
    assert gradient_error(trainer, rows, same_shape=True) == pytest.approx(error, rel=0.02)
    assert gradient_error(make_trainer(model_dir, chosen), rows, same_shape=True) < 1e-5


@pytest.mark.parametrize("join", [packing.pack_rows, pad_rows])
def test_a_row_alone_in_the_shape_of_all(model_dir: Path, join: Any) -> None:
    trainer = make_trainer(model_dir, recipe(train={"packing": "packed" if join is packing.pack_rows else "padded"}))
    rows = groups_as_rows()[:3]
    together = join(rows, 9)
    device, count = torch.device("cpu"), [row.loss_tokens for row in rows]
    assert len(set(map(len, rows))) == 3 and len(set(count)) == 3
    for index, row in enumerate(rows):
        micro, its = parity.in_the_shape_of_all(rows, index, join=join, pad_token=9)
        assert (its.start, its.stop) == (sum(count[:index]), sum(count[: index + 1]))
        assert micro.tokens_BL.shape == together.tokens_BL.shape and len(micro.target_N) == len(together.target_N)
        flat = micro.tokens_BL.ravel()
        assert flat[: len(row)].tolist() == row.tokens.tolist() and set(flat[len(row) :]) == {9}
        assert micro.target_N[its].tolist() == row.tokens[row.prompt_length :].tolist()
        assert micro.predict_N[its].tolist() == list(range(row.prompt_length - 1, len(row) - 1))
        others = np.delete(micro.predict_N, np.r_[its])
        assert len(set(others)) == len(others) and others.min() >= len(row)  # each its own, none of this row's
        if micro.bounds_S1 is not None:
            assert micro.bounds_S1[1] == len(row) and len(micro.bounds_S1) == len(rows) + 1
        alone, _ = parity.logprobs(trainer.policy, trainer.adapter, pad_rows([row], 9), device)
        found, _ = parity.logprobs(trainer.policy, trainer.adapter, micro, device)
        assert (found[its] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_noise_of_rounding_is_a_unit_in_the_last_place_and_no_leak(model_dir: Path, checkpointing: str) -> None:
    chosen = recipe(train={"packing": "packed", "activation_checkpointing": checkpointing})
    trainer = make_trainer(model_dir, chosen)
    rows = parity.spread(groups_as_rows(), 256)
    noise = trainer.row_check.rounding_noise(rows)
    assert 1e-2 < noise < 0.3  # four blocks, each moved by 2^-8
    assert noise == trainer.row_check.rounding_noise(rows)
    assert gradient_error(trainer, rows) < 1e-5  # nothing of it stays


def test_log_probabilities_of_rows_in_one_shape_and_in_their_own(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe(train={"packing": "packed"}))
    rows = parity.spread(groups_as_rows(), 256)
    found = trainer.row_check.logprob_figures(rows, in_bf16=True)
    assert found["rows_max_abs"] < 1e-5 and found["rows_own_shape_max_abs"] < 1e-4 and len(found) == 2
    assert trainer.row_check.logprob_figures(rows, in_bf16=False).keys() == {"rows_max_abs"}


def test_large_logits_excuse_rows_in_their_own_shapes_only() -> None:
    """A pretrained model whose tokens move by 0.36 where rounding moves them by 0.3."""
    own, noise = "rows_own_shape_max_abs", "rows_max_noise"
    on_a_gpu().require({"rows_max_abs": 0.2, own: 0.36, noise: 0.3})
    for found, limit in (
        ({"rows_max_abs": 0.3, own: 0.36, noise: 0.3}, "2.5e-01"),
        ({"rows_max_abs": 0.0, own: 0.61, noise: 0.3}, "6.0e-01"),
        ({"rows_max_abs": 0.0, own: 0.36, noise: 0.1}, "2.5e-01"),
        ({"rows_max_abs": 0.0, own: 2.1, noise: 9.0}, "2.0e+00"),
    ):
        with pytest.raises(RunFailed, match=f"log-probability.*allowed {re.escape(limit)}"):
            on_a_gpu().require(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_in_the_last_place_goes_up_as_often_as_down(dtype: torch.dtype) -> None:
    hidden = torch.randn(30000, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = parity.a_unit_off(hidden, 3)
    assert moved.dtype == dtype and torch.equal(moved, parity.a_unit_off(hidden, 3))
    share = (moved.double() - hidden.double()) / hidden.double()
    assert abs(float((share > 0).double().mean()) - 1 / 3) < 0.02  # 1 + 2^-8 as a factor in bf16 is 1
    assert abs(float((share < 0).double().mean()) - 1 / 3) < 0.02
    assert float(share.abs().max()) <= (2.0**-8 if dtype == torch.float32 else 2.0**-7) * 1.001


def on_a_gpu() -> parity.RowCheck:
    """What judges figures of a GPU."""
    masters: Any = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cuda")))
    return parity.RowCheck(None, ADAPTER, masters, packed=True)  # type: ignore[arg-type]


def test_what_excuses_a_difference_on_a_gpu_and_by_how_much() -> None:
    """In one shape what kernels are apart from themselves; in shapes of their own what rounding does; never a leak."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    error, own = "rows_gradient_error", "rows_gradient_own_shape"
    assert parity.gradient_limits({"rows_gradient_noise": 0.1, "rows_gradient_repeat": 0.1}, cpu) == {error: 1e-4}
    for noise, limit in ((0.0, 1e-2), (0.005, 1e-2), (0.05, 0.05), (3.0, 0.15)):
        assert parity.gradient_limits({"rows_gradient_noise": noise}, cuda) == {error: 1e-2, own: limit}
    for repeat, limit in ((0.0, 1e-2), (0.004, 1e-2), (0.02, 0.04), (3.0, 0.15)):
        assert parity.gradient_limits({"rows_gradient_repeat": repeat}, cuda) == {error: limit, own: 1e-2}
    on_a_gpu().require({error: 9e-3, own: 0.04, "rows_gradient_noise": 0.05})
    on_a_gpu().require({error: 0.03, own: 0.009, "rows_gradient_repeat": 0.02})
    for found, limit in (
        ({error: 0.02, own: 0.04, "rows_gradient_noise": 0.17, "rows_gradient_repeat": 1e-8}, "1.0e-02"),
        ({error: 0.001, own: 0.06, "rows_gradient_noise": 0.05}, "5.0e-02"),
        ({error: 0.001, own: 0.26, "rows_gradient_noise": 0.9}, "1.5e-01"),
        ({error: float("nan"), own: 0.001}, "1.0e-02"),
    ):
        with pytest.raises(RunFailed, match=f"allowed {limit}"):
            on_a_gpu().require(found)


def test_what_a_gpu_measures(model_dir: Path) -> None:
    """Both errors; what excuses them only where they are over the tolerance."""

    def figures(**train: Any) -> dict[str, float]:
        trainer = make_trainer(model_dir, recipe(train={"packing": "packed", "tokens_per_microbatch": 256, **train}))
        rows = parity.spread(groups_as_rows(), 256)
        found = trainer.row_check.gradient_figures(rows, in_bf16=True)
        assert not trainer.masters.grads.found()
        return found

    right = figures()
    assert right.keys() == {"rows_gradient_error", "rows_gradient_own_shape"} and max(right.values()) < 1e-5
    leaking = figures(row_boundaries="ignored")
    assert leaking["rows_gradient_error"] > 0.1 and leaking["rows_gradient_own_shape"] > 0.1
    assert leaking["rows_gradient_repeat"] == 0.0 and 1e-2 < leaking["rows_gradient_noise"] < 0.3
    with pytest.raises(RunFailed, match=r"allowed 1\.0e-02"):
        on_a_gpu().require(leaking)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("same_shape", [True, False])
def test_one_order_is_asked_of_every_attention_of_rows_in_one_shape(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, same_shape: bool
) -> None:
    """Of a block that is computed again, the backward pass goes through what the first forward built."""
    trainer = make_trainer(model_dir, recipe(train={"packing": "packed", "activation_checkpointing": checkpointing}))
    modes: list[bool] = []

    def told(out: torch.Tensor) -> torch.Tensor:
        ordered = real(out)
        assert ordered.grad_fn is not None
        ordered.grad_fn.register_prehook(lambda _: modes.append(torch.are_deterministic_algorithms_enabled()))
        return ordered

    real = varlen.ordered
    monkeypatch.setattr(varlen, "ordered", told)
    gradient_error(trainer, parity.spread(groups_as_rows(), 256), same_shape=same_shape)
    assert modes and set(modes) == {same_shape} and not torch.are_deterministic_algorithms_enabled()


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


def gradient_error(trainer: Any, rows: list[Row], *, same_shape: bool = False) -> float:
    error = trainer.row_check.gradient_error(rows, same_shape=same_shape)
    assert all(p.grad is None for p in trainer.policy.parameters())
    return error
