"""An engine in bf16: how far it may be from the trainer, by the adapter's tolerance and by what rounding does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_packing import groups_as_rows
from test_training_step import stale
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.errors import RunFailed
from astracli.training import parity


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def differing(model_dir: Path, by: float, *, bf16: bool = True, **train: float) -> dict[str, float]:
    """Metrics of a step whose engine is `by` off in the mean."""
    trainer = make_trainer(model_dir, recipe(train=train))
    trainer.bf16_engine = bf16
    return trainer.train(stale(sample_groups(trainer, 4, seed=1), 2 * by, version=0), 0, 0).metrics


def test_the_noise_of_a_log_probability_is_small_and_grows_with_the_logits(model_dir: Path) -> None:
    trainer = make_trainer(model_dir, recipe())
    rows = parity.spread(groups_as_rows(), 256)

    def noise() -> float:
        return trainer.row_check.logprob_noise(rows)

    plain = noise()
    assert 1e-3 < plain < 5e-2 and noise() == plain
    with torch.no_grad():
        trainer.policy.model.get_output_embeddings().weight.mul_(20)
    assert noise() > 5 * plain
    assert all(p.grad is None for p in trainer.policy.parameters())
    assert not any(block._forward_pre_hooks for block in trainer.adapter.blocks(trainer.policy.model))


def test_the_adapters_tolerance_is_that_of_the_engines_precision(model_dir: Path) -> None:
    assert differing(model_dir, 0.008)["parity_mean_abs"] == pytest.approx(0.008, abs=0.001)
    with pytest.raises(RunFailed, match=r"allowed mean 1\.0e-04"):
        differing(model_dir, 0.008, bf16=False)
    with pytest.raises(RunFailed, match=r"allowed mean [1-3]\.\de-02"):  # this model's noise does not allow it
        differing(model_dir, 0.05)


def test_noise_allows_twice_itself_and_never_more_than_a_tenth(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity.RowCheck, "logprob_noise", lambda *_: 0.03)
    assert "parity_noise" not in differing(model_dir, 0.008)
    assert differing(model_dir, 0.05)["parity_noise"] == 0.03
    with pytest.raises(RunFailed, match=r"allowed mean 6\.0e-02"):
        differing(model_dir, 0.07)
    with pytest.raises(RunFailed, match=r"allowed mean 1\.0e-03"):  # what a recipe says is final
        differing(model_dir, 0.05, parity_tolerance=1e-3)
    told = differing(model_dir, 0.05, parity_tolerance=1.0)
    assert told["parity_noise"] == 0.03 and told["parity_mean_abs"] == pytest.approx(0.05, abs=0.01)
    monkeypatch.setattr(parity.RowCheck, "logprob_noise", lambda *_: 5.0)
    with pytest.raises(RunFailed, match=r"allowed mean 1\.0e-01"):
        differing(model_dir, 0.2)
