"""pass@k and avg@n against hand-worked numbers and brute force over all subsets."""

import itertools

import pytest

from astracli.evaluation.passk import Score, overall, pass_at_k, score


def test_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # one of the six pairs holds both wrong ones
    assert pass_at_k(16, 1, 4) == pytest.approx(0.25)
    assert pass_at_k(8, 0, 4) == 0.0
    assert pass_at_k(8, 5, 4) == 1.0


@pytest.mark.parametrize("n", [1, 3, 6])
def test_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_score_by_hand() -> None:
    found = score([[True, True], [True, False], [False, False]], k=4)
    # shares 1, 1/2, 0: mean 1/2, unbiased sd 1/2, standard error 1/2 / sqrt(3); k is cut to 2 samples
    assert found == Score(3, 2, 0.5, pytest.approx(0.5 / 3**0.5), 2, pytest.approx(2 / 3), (0.5, pytest.approx(2 / 3)))
    low, high = found.interval  # 0.25 / (1/12) = 3 draws' worth
    assert (low, high) == pytest.approx((0.12533, 0.87467), abs=1e-5) and low + high == pytest.approx(1.0)
    assert score([[True]], k=1).stderr == 0.0


def test_interval_is_wilsons_where_every_draw_is_an_item_and_never_empty() -> None:
    half = [[True]] * 50 + [[False]] * 50
    share, n = 0.5, 99  # the unbiased spread of 100 items is worth 99 draws
    root = (share * (1 - share) / n + 1.96**2 / (4 * n * n)) ** 0.5
    assert score(half, 1).interval == pytest.approx(
        (0.5 - 1.96 * root / (1 + 1.96**2 / n), 0.5 + 1.96 * root / (1 + 1.96**2 / n))
    )
    assert score([[False]] * 30, 1).interval == pytest.approx((0.0, 0.1135), abs=1e-4)
    assert score([[True, True]] * 30, 1).interval == pytest.approx((0.8865, 1.0), abs=1e-4)
    wide = score([[True] * 9 + [False]] * 10_000, 1)  # no spread over items, but items enough
    assert wide.interval[0] < 0.9 < wide.interval[1] < 0.91


def test_score_needs_the_same_samples_everywhere() -> None:
    for ragged in ([], [[]], [[True], [True, False]]):
        with pytest.raises(ValueError):
            score(ragged, k=1)


def test_overall_weighs_benchmarks_alike() -> None:
    found = overall([Score(30, 16, 0.2, 0.03, 4, 0.4), Score(500, 4, 0.8, 0.04, 4, 0.9)])
    assert found == Score(530, 4, pytest.approx(0.5), pytest.approx(0.025), 4, pytest.approx(0.65))
    both = overall([score([[True, False]], 2), score([[True, True]], 2)])
    assert both.pass_at == (0.75, 1.0)
    with pytest.raises(ValueError):
        overall([])
