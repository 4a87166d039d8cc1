"""What the length of a completion does: overlong shaping, and means over sequences that do not see lengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from training_tools import recipe, sample_groups

from astracli.config.algorithms import AlgorithmTable
from astracli.config.recipe_rollout import RolloutTable
from astracli.rl import losses
from astracli.rl.batch import build_batch
from astracli.rl.rows import Row, overlong_penalties, rows_of
from astracli.rl.types import Group, Sample, Segment
from astracli.training import objective

LOSS_LENGTH = 10
"""The constant of dr_grpo here."""


def test_overlong_penalty_by_hand() -> None:
    # 20 tokens at most, the last 5 of them in a straight line
    lengths = np.array([3, 15, 16, 18, 20, 25])
    assert overlong_penalties(lengths, 20, 0.25, 0.5).tolist() == pytest.approx([0, 0, 0.1, 0.3, 0.5, 0.5])
    assert overlong_penalties(lengths, 20, 0.0, 0.5).tolist() == [0.0] * 6


def test_the_penalty_of_half_is_that_of_the_paper() -> None:
    """Rewards 0 and 1 with penalty 0.5 have the advantages of rewards -1 and 1 with penalty 1."""
    (group,) = sample_groups(None, 1, seed=3, size=6)
    ours = build(group, table(name="dapo"))
    for sample in group.samples:
        sample.reward = 2 * sample.reward - 1
    theirs = build(group, table(name="dapo", overlong_penalty=1.0))
    assert [r.advantage for r in ours] == pytest.approx([r.advantage for r in theirs], rel=1e-4)
    assert any(r.penalty for r in ours)


def table(**values: Any) -> AlgorithmTable:
    return AlgorithmTable.model_validate(values)


def build(group: Any, algorithm: AlgorithmTable) -> list[Row]:
    longest = max(len(s.tokens) for s in group.samples)
    return rows_of([group], algorithm, RolloutTable.model_validate({"max_new_tokens": longest}))


def lengths_group(lengths: list[int], rewards: list[float], prompt: int = 2) -> Group:
    samples = [
        Sample(i, [Segment(0, np.arange(2, 2 + n, dtype=np.int32), np.full(n, -1.0, np.float32))], "stop", reward)
        for i, (n, reward) in enumerate(zip(lengths, rewards, strict=True))
    ]
    return Group(0, "p", np.arange(2, 2 + prompt, dtype=np.int32), samples)


@pytest.mark.parametrize(("name", "share"), [("gspo", 1 / 2), ("dr_grpo", 1 / 2)])
def test_a_long_sequence_weighs_no_more_than_a_short_one(name: str, share: float) -> None:
    """Completions of 9, 1, 1, 1 tokens in two minibatches: the long one is alone in the first, and still is one of two
    sequences a minibatch; with its own count, 1, it would weigh three times a short one."""
    chosen = recipe(algorithm={"name": name, "dr_grpo": {"loss_length": LOSS_LENGTH}})
    batch = build_batch(
        [lengths_group([9, 1, 1, 1], [1.0, 0.0, 1.0, 0.0])],
        chosen,
        step=0,
    )
    assert sorted(sorted(r.loss_tokens for m in part for r in m.rows) for part in batch.minibatches) == [[1, 1, 1], [9]]
    normaliser = losses.get(name).normaliser
    for index, minibatch in enumerate(batch.minibatches):
        divisor = objective.denominator(normaliser, batch, index, chosen)
        (micro,) = minibatch
        whole = objective.normalised(normaliser, torch.ones(len(micro.target_N)), micro, divisor)
        # a loss of 1 a token: 1 a sequence in gspo, its length / LOSS_LENGTH in dr_grpo
        each = len(micro.rows) if name == "gspo" else len(micro.target_N) / LOSS_LENGTH
        assert whole.item() == pytest.approx(each * share)


def test_batch_norm_counts_what_the_loss_is_a_mean_of() -> None:
    """Advantages by the mean 0.5 and -0.5; completions of 3 and 1 tokens."""

    def normalised(name: str) -> list[float]:
        chosen = table(name=name, batch_norm_advantage=True, **{name: {"advantage": "mean"}})
        return [
            row.advantage
            for row in rows_of([lengths_group([3, 1], [1.0, 0.0])], chosen, RolloutTable.model_validate({}))
        ]

    # sequences: mean 0, variance (1/4 + 1/4) / 1; tokens: mean 1/4, variance (3/16 + 9/16) / 3 = 1/4
    scale = math.sqrt(0.5) + 1e-5
    assert normalised("gspo") == pytest.approx([0.5 / scale, -0.5 / scale])
    assert normalised("grpo") == pytest.approx([0.25 / 0.50001, -0.75 / 0.50001])


def test_a_completion_that_the_context_cuts_short_is_overlong() -> None:
    """Context 20, a prompt of 8: room for 12 of the 16 tokens; the ramp is the last 6 of them."""
    chosen = table(overlong_fraction=0.5, overlong_penalty=0.5, m2po={"advantage": "mean"})
    rollout = RolloutTable.model_validate({"max_new_tokens": 16, "context_length": 20})
    rows = rows_of([lengths_group([6, 9, 12], [1.0, 0.0, 1.0], prompt=8)], chosen, rollout)
    assert [row.penalty for row in rows] == pytest.approx([0.0, 0.25, 0.5])
    # 1, -1/4, 1/2: mean 5/12
    assert [row.advantage for row in rows] == pytest.approx([7 / 12, -8 / 12, 1 / 12])
    rows = rows_of([lengths_group([8, 12, 16], [1.0, 0.0, 1.0], prompt=4)], chosen, rollout)
    assert [row.penalty for row in rows] == pytest.approx([0.0, 0.25, 0.5])
