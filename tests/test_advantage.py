"""Advantages against numbers worked by hand."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from astracli.rl.losses import UsualSettings, group_advantage
from astracli.rl.rows import batch_normalise


def group_advantages(rewards_S: np.ndarray, mode: Literal["group", "mean"]) -> np.ndarray:
    return group_advantage(rewards_S, np.ones(len(rewards_S)), UsualSettings(advantage=mode))


def test_group_uses_the_unbiased_spread() -> None:
    # mean 1/4; squares (3/4)^2 + 3 (1/4)^2 = 12/16; unbiased variance 12/16/3 = 1/4, std 1/2
    result = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "group")
    assert result == pytest.approx([0.75 / 0.50001, *[-0.25 / 0.50001] * 3], rel=1e-12)


def test_mean_only_centres() -> None:
    assert group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), "mean").tolist() == [0.75, -0.25, -0.25, -0.25]


def test_equal_rewards_give_zeros() -> None:
    assert group_advantages(np.array([1.0, 1.0, 1.0]), "group").tolist() == [0.0, 0.0, 0.0]


def test_batch_norm_weighs_by_tokens() -> None:
    # three tokens at 1, one at -1: mean 1/2, squares 3 (1/2)^2 + (3/2)^2 = 3, unbiased variance 3/3 = 1
    result = batch_normalise(np.array([1.0, -1.0]), np.array([3, 1]))
    assert result == pytest.approx([0.5 / 1.00001, -1.5 / 1.00001], rel=1e-12)
    assert (result * [3, 1]).sum() == pytest.approx(0.0, abs=1e-12)


def test_batch_norm_of_fewer_than_two_counts_is_zero() -> None:
    assert batch_normalise(np.array([0.5]), np.array([1])).tolist() == [0.0]


def test_batch_norm_of_equal_advantages_is_zero() -> None:
    assert batch_normalise(np.array([0.5, 0.5]), np.array([3, 2])).tolist() == [0.0, 0.0]


def test_batch_norm_after_group_norm() -> None:
    centred = [group_advantages(np.array(rewards), "mean") for rewards in ([1.0, 0.0], [1.0, 0.0, 0.0])]
    result = batch_normalise(np.concatenate(centred), np.array([2, 2, 1, 1, 1]))
    # centred: 1/2 -1/2 | 2/3 -1/3 -1/3, token mean 0; squares 4/4 + 4/9 + 1/9 + 1/9 = 5/3; variance 5/3/6 = 5/18
    scale = np.sqrt(5 / 18) + 1e-5
    assert result == pytest.approx(np.array([0.5, -0.5, 2 / 3, -1 / 3, -1 / 3]) / scale)
