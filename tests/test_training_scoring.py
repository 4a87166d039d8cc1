"""The pass without gradients: when it is made, and what of it reaches the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_tools import make_trainer, recipe, sample_groups, save_model

from astracli.training.step import Trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def scorings(trainer: Trainer) -> list[int]:
    """The versions of the trainer's scoring passes, as they are made."""
    made: list[int] = []
    score = trainer._score

    def counted(batch: Any, version: int, *rest: Any) -> Any:
        made.append(version)
        return score(batch, version, *rest)

    trainer._score = counted  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(("deterministic", "expected"), [(False, [0]), (True, [0, 1, 2])])
def test_a_deterministic_run_scores_every_step(model_dir: Path, deterministic: bool, expected: list[int]) -> None:
    """Left out in the second step and not in the first of a resumed process, it would make a difference."""
    chosen = recipe(train={"minibatches": 1}, launch={"deterministic": deterministic})
    trainer = make_trainer(model_dir, chosen)
    made = scorings(trainer)
    for step in range(3):
        trainer.train(sample_groups(trainer, 2, seed=step, version=step), step, step)
    assert made == expected


def test_a_stale_minibatch_is_scored_in_every_step(model_dir: Path) -> None:
    """Its first tokens lie 0.15 from the policy, on the side of their advantage; the others 0.001: the mean of the
    moments is under 0.01, so all are kept and the limit is 0.15, not the root of 0.01."""
    trainer = make_trainer(model_dir, recipe(train={"minibatches": 1, "learning_rate": 1e-9}))
    trainer.train(sample_groups(trainer, 2, seed=0), 0, 0)
    made = scorings(trainer)
    groups = sample_groups(trainer, 4, seed=1, version=0)
    for group in groups:
        for sample in group.samples:
            toward = 1.0 if sample.reward > group.rewards.mean() else -1.0
            moved = np.full(len(sample.tokens), -1e-3 * toward, np.float32)
            moved[0] = -0.15 * toward
            sample.segments[0].logprobs = sample.segments[0].logprobs + moved
    metrics = trainer.train(groups, 1, 1).metrics
    assert made == [1]
    assert metrics["m2_limit"] == pytest.approx(0.15, rel=1e-3)


def test_later_minibatches_move_away_from_the_policy_of_the_start(model_dir: Path) -> None:
    trainer = make_trainer(
        model_dir,
        recipe(algorithm={"name": "tis", "clip_low": 1e-3, "clip_high": 1e-3}, train={"learning_rate": 1e-2}),
    )
    metrics = trainer.train(sample_groups(trainer, 4, seed=1), 0, 0).metrics
    assert metrics["updates"] == 2
    assert 0.1 < metrics["clip_fraction"] < 0.5  # of the second minibatch; nothing of the first


def test_kl_pulls_back_to_the_initial_model(model_dir: Path) -> None:
    """Groups without signal: the loss is the coefficient times the KL, and steps make it smaller."""
    trainer = make_trainer(
        model_dir, recipe(algorithm={"name": "grpo", "kl_coef": 0.5}, train={"minibatches": 1, "learning_rate": 1e-3})
    )
    for step in range(3):
        trainer.train(sample_groups(trainer, 4, seed=0, version=step), step, step)
    kl = []
    for step in range(3, 8):
        groups = sample_groups(trainer, 4, seed=1, version=step)
        for sample in (s for g in groups for s in g.samples):
            sample.reward = 1.0
        metrics = trainer.train(groups, step, step).metrics
        assert metrics["loss"] == pytest.approx(0.5 * metrics["kl"], rel=1e-4)
        kl.append(metrics["kl"])
    assert kl[0] > 0 and kl[-1] < kl[0]
