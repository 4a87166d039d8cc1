"""Majority votes, and the sign-flip test: it finds a difference that is there and none that is not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astracli.errors import UserError
from astracli.evaluation import votes
from astracli.evaluation.compare import Shares, compare, read_shares, words


def evaluation(seed: int, gain: float, items: int = 300, noise: float = 0.1) -> Shares:
    """Items of very different difficulty, the same for every seed; `gain` is added to each share."""
    difficulty = np.random.default_rng(99).uniform(0, 0.8, items)
    drawn = np.clip(difficulty + gain + np.random.default_rng(seed).normal(0, noise, items), 0, 1)
    return {"b": {f"i{i}": float(share) for i, share in enumerate(drawn)}}


def test_a_small_difference_is_found_because_items_are_paired() -> None:
    a, b = evaluation(1, 0.0), evaluation(2, 0.03)
    (row,) = compare(a, b)
    assert row.real and row.low < row.difference < row.high and row.p < 0.01
    unpaired = 1.96 * np.hypot(*(np.std(list(e["b"].values())) / 300**0.5 for e in (a, b)))
    assert row.high - row.low < unpaired  # its whole width is less than half of the width without pairing
    (back,) = compare(b, a)
    assert back.difference == pytest.approx(-row.difference) and back.real


def named(shares: Any) -> Shares:
    return {"b": {f"i{i}": float(share) for i, share in enumerate(shares)}}


@pytest.mark.parametrize(("items", "least"), [(1, 0.0), (2, 0.0), (4, 0.0), (8, 0.01), (30, 0.02), (300, 0.02)])
def test_no_difference_is_called_real_at_most_one_time_in_twenty(items: int, least: float) -> None:
    """Eight samples an item, of items from hopeless to easy, from one and the same model."""
    rng, times, real = np.random.default_rng(items), 600, 0
    for _ in range(times):
        chance = rng.uniform(0, 1, items)
        a, b = (named(rng.binomial(8, chance) / 8) for _ in range(2))
        (row,) = compare(a, b, draws=399)
        assert row.real == (not row.low <= 0 <= row.high)
        assert (row.verdict == "too few items") == (items < 6)
        real += row.real
    assert least <= real / times <= 0.05


def test_one_item_is_never_a_difference() -> None:
    (row,) = compare(named([0.0]), named([1.0]))
    assert (row.difference, row.p, row.low, row.high) == (1.0, 1.0, -math.inf, math.inf)
    assert not row.real and words(row).startswith("too few items: +1.000 over 1")
    (five,) = compare(named([0.0] * 5), named([1.0] * 5))
    assert five.p == 2 / 32 and five.verdict == "too few items"
    (six,) = compare(named([0.0] * 6), named([1.0] * 6))
    assert six.p == 2 / 64 and six.verdict == "real"


def test_a_few_items_that_differ_among_many_are_no_difference() -> None:
    (row,) = compare(named([0.5] * 30), named([1.0] * 5 + [0.5] * 25))
    assert row.verdict == "not shown" and words(row).endswith("; 5 of 30 items differ")
    assert row.p == pytest.approx(2 / 32, abs=0.01) and row.low <= 0
    (more,) = compare(named([0.5] * 30), named([1.0] * 8 + [0.5] * 22))
    assert more.real and more.p == pytest.approx(2 / 256, abs=0.004)


def test_all_signs_of_seven_items_by_brute_force() -> None:
    """p, and the interval: it holds the shifts that the same test does not reject."""
    differences = np.array([0.5, 0.25, -0.125, 0.375, 0.0, 0.625, 0.25])

    def share(shift: float) -> float:
        means = [np.mean(s * (differences - shift)) for s in itertools.product((1, -1), repeat=7)]
        return float(np.mean(np.abs(means) >= abs(np.mean(differences - shift)) - 1e-12))

    (row,) = compare(named(np.full(7, 0.3)), named(0.3 + differences))
    assert row.p == pytest.approx(share(0.0))
    for edge, outwards in ((row.low, -1e-6), (row.high, 1e-6)):
        assert share(edge - outwards) > 0.05 >= share(edge + outwards)


def test_the_same_evaluation_twice() -> None:
    same = evaluation(1, 0.0)
    (row,) = compare(same, same)
    assert (row.low, row.high) == (0.0, 0.0)
    assert (row.difference, row.p, row.real) == (0.0, 1.0, False)


def test_overall_is_the_mean_over_benchmarks_and_the_seed_decides() -> None:
    a = {"b": evaluation(1, 0.0)["b"], "c": evaluation(3, 0.0, items=50)["b"]}
    b = {"b": evaluation(2, 0.1)["b"], "c": evaluation(4, -0.1, items=50)["b"]}
    rows = compare(a, b)
    assert [row.benchmark for row in rows] == ["b", "c", "overall"] and rows[2].items == 350
    assert rows[2].difference == pytest.approx((rows[0].difference + rows[1].difference) / 2)
    assert compare(a, b) == rows and compare(a, b, seed=1) != rows


def test_each_benchmark_is_drawn_for_itself() -> None:
    """Two equal benchmarks: the overall interval is narrower by the root of two, as with independent draws."""
    a, b = ({name: evaluation(seed, 0.0)["b"] for name in "bc"} for seed in (1, 2))
    first, second, both = compare(a, b)
    assert (both.high - both.low) / (first.high - first.low) == pytest.approx(0.5**0.5, rel=0.05)
    assert (first.low, first.high) != (second.low, second.high)


def test_interval_and_p_by_hand() -> None:
    # differences +0.1 and -0.1 in halves: sd 0.1, standard error 0.1 / sqrt(400)
    a = {"b": {f"i{i}": 0.5 for i in range(400)}}
    b = {"b": {f"i{i}": 0.6 if i % 2 else 0.4 for i in range(400)}}
    (row,) = compare(a, b)
    assert (row.low, row.high) == pytest.approx((-1.96 * 0.005, 1.96 * 0.005), rel=0.05)
    assert row.p > 0.9 and not row.real
    (better,) = compare(a, {"b": {f"i{i}": 0.6 + 0.001 * (i % 2) for i in range(400)}}, draws=999)
    assert better.p == 1 / 1000 and better.real  # no draw so far from 0
    (worse,) = compare(b={"b": {f"i{i}": 0.4 for i in range(400)}}, a=a, draws=999)
    assert worse.p == 1 / 1000 and worse.real


def test_other_items_are_refused_with_the_figures() -> None:
    with pytest.raises(UserError, match="`b` has 300 items in one evaluation and 200 in the other, 200 in common"):
        compare(evaluation(1, 0.0), evaluation(1, 0.0, items=200))
    with pytest.raises(UserError, match="no benchmark in common: b and c"):
        compare(evaluation(1, 0.0), {"c": {"i": 1.0}})


def write(folder: Path, step: int, rights: list[bool]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"benchmark": "b", "problem_id": f"i{i // 2}", "verdict": "right" if right else "wrong"}
        for i, right in enumerate(rights)
    ]
    (folder / f"step_{step:06d}_b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_a_step_of_it_and_the_command(tmp_path: Path, astra: Callable[..., Any]) -> None:
    write(tmp_path / "run" / "eval" / "items", 0, [False] * 40)
    write(tmp_path / "run" / "eval" / "items", 12, [True, False] * 20)
    run = str(tmp_path / "run")
    assert set(read_shares(run)["b"].values()) == {0.5} and set(read_shares(f"{run}@0")["b"].values()) == {0.0}
    with pytest.raises(UserError, match="no evaluation of step 3: 0, 12"):
        read_shares(f"{run}@3")
    with pytest.raises(UserError, match="holds no evaluation"):
        read_shares(str(tmp_path))
    done = astra("eval", "--compare", f"{run}@0", run)
    assert done.code == 0 and "b: B is better: +0.500, 95 % interval +0.500 to +0.500" in done.out
    (row,) = json.loads(astra("eval", "--compare", run, run, "--json").out)["benchmarks"]
    assert (row["items"], row["real"], row["verdict"]) == (20, False, "not shown")
    write(tmp_path / "few" / "items", 0, [False] * 4)
    write(tmp_path / "few" / "items", 1, [True] * 4)
    few = str(tmp_path / "few")
    assert "b: too few items: +1.000 over 2" in astra("eval", "--compare", f"{few}@0", few).out
    (row,) = json.loads(astra("eval", "--compare", f"{few}@0", few, "--json").out)["benchmarks"]
    assert (row["low"], row["high"], row["p"], row["verdict"]) == (None, None, 0.5, "too few items")


def test_votes() -> None:
    right, wrong = votes.vote("so \\boxed{1,024}", True), votes.vote("\\boxed{7}", False)
    assert right == votes.vote("\\boxed{1024}", True) == ("1024", True)
    assert votes.vote("nothing to read", False)[0] is None
    assert votes.winner_share([right, right, wrong]) == 1.0
    assert votes.winner_share([right, wrong, wrong]) == 0.0
    assert votes.winner_share([right, wrong]) == 0.5
    assert votes.winner_share([(None, False)] * 3) == 0.0
    assert votes.winner_share([(None, False)] * 3 + [right]) == 1.0  # who says nothing does not vote


def test_majority_of_one_is_the_average_and_of_all_the_vote() -> None:
    right, wrong = ("1", True), ("2", False)
    found = votes.majority_at([[right, right, right, wrong], [wrong, wrong, wrong, right]])
    assert list(found) == [1, 2, 4]
    assert (found[1], found[4]) == (0.5, 0.5)
    assert votes.majority_at([[right, right, wrong]])[1] == pytest.approx(2 / 3)
    mixed = [right, right, wrong, ("3", False), (None, False)]  # every item has draws of its own
    alone, twice = votes.majority_at([mixed])[2], votes.majority_at([mixed, mixed])[2]
    assert 0.3 < alone < 0.9 and alone != twice
    assert votes.sizes(6) == [1, 2, 4, 6] and votes.sizes(1) == [1]
