"""The pass without gradients: when it is made, and what of it reaches the loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_tools import divided, make_trainer, recipe, sample_groups, save_model

from astracli.kernels.cpu import linear
from astracli.rl.batch import MicroBatch
from astracli.training import parity, scoring
from astracli.training.scoring import Work
from astracli.training.step import Trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def scorings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each scoring pass, as they are made, how many minibatches it scores."""
    made: list[int] = []
    score = scoring.score_policy

    def counted(trainer: Trainer, work: Work, micros: list[MicroBatch], kept: set[int]) -> None:
        made.append(sum(any(micro in micros for micro in minibatch) for minibatch in work.batch.minibatches))
        score(trainer, work, micros, kept)

    monkeypatch.setattr(scoring, "score_policy", counted)
    return made


@pytest.mark.parametrize(
    ("name", "deterministic", "expected"),
    [("grpo", False, [2, 1, 1]), ("grpo", True, [2, 2, 2]), ("m2po", False, [2, 2, 2])],
)
def test_which_minibatches_are_scored(
    model_dir: Path, name: str, deterministic: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one trains from the weights that would score it. Left out in the second step and not in the first of a
    resumed process, it would make a difference. M2PO's limits come from all log-ratios of the batch."""
    chosen = recipe(algorithm={"name": name}, launch={"deterministic": deterministic})
    trainer = make_trainer(model_dir, chosen)
    made = scorings(monkeypatch)
    for step in range(3):
        trainer.train(sample_groups(trainer, 2, seed=step, version=step), step, step)
    assert made == expected


@pytest.mark.parametrize("name", ["grpo", "m2po"])
@pytest.mark.parametrize("budget", [64, 4096])
def test_what_is_done_once_changes_nothing(
    model_dir: Path, name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two minibatches: weights bit for bit, and figures, are those of deterministic mode, which scores
    every row first. `passes`: forward passes of a step."""
    common: dict[str, Any] = {"train": {"tokens_per_microbatch": budget, "parity_tolerance": 100.0}}
    recipes = [recipe(algorithm={"name": name}, launch={"deterministic": on}, **common) for on in (False, True)]
    monkeypatch.setattr(linear, "advantage", lambda: 100.0)  # both through oneDNN, as deterministic mode is
    trainers, seen, passes = [make_trainer(model_dir, chosen) for chosen in recipes], [], []
    real = parity.logprobs

    def counted(*arguments: Any) -> Any:
        passes[-1] += 1
        return real(*arguments)

    monkeypatch.setattr(parity, "logprobs", counted)
    groups = sample_groups(trainers[0], 8, seed=3)
    for trainer in trainers:
        trainer.first_step = False
        for step in range(2):
            passes.append(0)
            metrics = trainer.train(groups[4 * step : 4 * step + 4], step + 1, 0).metrics
        seen.append({key: value for key, value in metrics.items() if not key.endswith("_s")})
    micros, first = int(seen[0]["microbatches"]), len(divided(trainers[0], groups[4:], 2).minibatches[0])
    assert (first > 1) is (budget == 64)
    assert passes[1] == 2 * micros - (first if name == "grpo" else 1)
    assert passes[3] == 2 * micros - (first == 1), "deterministic mode reuses what fits at once"
    assert seen[0] == pytest.approx(seen[1], rel=1e-9, abs=1e-12)
    for key, value in trainers[0].masters.values.items():
        assert torch.equal(value, trainers[1].masters.values[key]), key


@pytest.mark.parametrize(("tau", "bounded"), [(0.01, False), (0.002, True)])
def test_a_batch_is_bounded_by_its_own_log_ratios(
    model_dir: Path, tau: float, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tokens lie 0.1 and more from the policy, on the side of their advantage, the others 0.001. The version is
    the trainer's own: a step that is not scored would take all of them for 0."""
    relaxed = {"minibatches": 1, "learning_rate": 1e-9, "parity_tolerance": 1.0}
    trainer = make_trainer(model_dir, recipe(train=relaxed, algorithm={"m2po": {"m2_threshold": tau}}))
    trainer.train(sample_groups(trainer, 2, seed=0), 0, 0)
    made = scorings(monkeypatch)
    groups, moments = sample_groups(trainer, 4, seed=1, version=1), []
    for group in groups:
        for sample in group.samples:
            toward = 1.0 if sample.reward > group.rewards.mean() else -1.0
            moved = np.full(len(sample.tokens), -1e-3 * toward, np.float32)
            moved[0] = -(0.1 + 0.01 * len(moments) / 13) * toward
            sample.segments[0].logprobs = sample.segments[0].logprobs + moved
            moments += (moved.astype(np.float64) ** 2).tolist()
    metrics = trainer.train(groups, 1, 1).metrics
    assert made == [1], "of one minibatch"
    moments.sort()
    kept = [m for i, m in enumerate(moments) if sum(moments[: i + 1]) / (i + 1) <= tau]
    assert (len(kept) < len(moments)) is bounded and kept[-1] > 1e-2
    assert metrics["m2_limit"] == pytest.approx(kept[-1] ** 0.5 if bounded else math.log(21.0), rel=1e-3)
    # the token that sets the limit trains, those beyond it do not
    assert metrics["clip_fraction"] == pytest.approx(1 - len(kept) / len(moments), abs=1e-9)


def test_later_minibatches_move_away_from_the_policy_of_the_start(model_dir: Path) -> None:
    trainer = make_trainer(
        model_dir,
        recipe(algorithm={"name": "tis", "tis": {"clip_low": 1e-3, "clip_high": 1e-3}}, train={"learning_rate": 1e-2}),
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
