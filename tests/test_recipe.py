"""The schema: what whole recipes may not say, and values that are derived in one place."""

from __future__ import annotations

from typing import Any

import pytest

from astracli.config import recipe_io
from astracli.config.recipe import Recipe
from astracli.errors import UserError

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "arithmetic"}, "train": {"steps": 5}}


def checked(**tables: dict[str, Any]) -> Recipe:
    return recipe_io.check(MINIMAL | {name: MINIMAL.get(name, {}) | table for name, table in tables.items()}, "r")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"rollout": {"group_size": 1}},
            "recipe `r`: rollout.group_size = 1: the advantages of m2po need at least 2 samples a prompt",
        ),
        (
            {"rollout": {"max_new_tokens": 64, "context_length": 64}},
            "recipe `r`: rollout.max_new_tokens = 64 leaves no room for a prompt in rollout.context_length = 64",
        ),
        (
            {"rollout": {"running_ceiling": {"44.5": 32}}},
            "recipe `r`: rollout.running_ceiling has the key `44.5`: a GPU's memory in whole GiB is meant, such as 48",
        ),
        (
            {"rollout": {"max_running_requests": "all"}},
            'recipe `r`: `rollout.max_running_requests` = "all" is not allowed: it takes a whole number greater than 0 '
            "and at most 65536 or `auto`",
        ),
        (
            {"eval": {"max_new_tokens": 9000}},
            "recipe `r`: eval.max_new_tokens = 9000 leaves no room for a prompt in rollout.context_length = 8192",
        ),
        (
            {"train": {"batch_groups": 1, "minibatches": 9}},
            "recipe `r`: train.minibatches = 9 is more than the 8 sequences of a step "
            "(train.batch_groups = 1 x rollout.group_size = 8)",
        ),
        (
            {"eval": {"samples": 2, "pass_k": 4}},
            "recipe `r`: eval.samples = 2 is fewer than eval.pass_k = 4: pass@k needs at least k samples an item",
        ),
        (
            {"data": {"template": "solve"}},
            "recipe `r`: data.template = 'solve' has neither {question} nor a column in it",
        ),
        (
            {"train": {"steps": 0}},
            "recipe `r`: `train.steps` = 0 is not allowed: it takes a whole number greater than 0",
        ),
        (
            {"train": {"learning_rate": float("inf")}},
            "recipe `r`: `train.learning_rate` = Infinity is not allowed: it takes a number greater than 0",
        ),
        (
            {"train": {"betas": [0.9, 1.0]}},
            "recipe `r`: `train.betas[1]` = 1.0 is not allowed: it takes a number of at least 0.0 and less than 1.0",
        ),
        (
            {"launch": {"deterministic": 1}},
            "recipe `r`: `launch.deterministic` = 1 is not allowed: it takes true or false",
        ),
        (
            {"data": {"levels": ["add2", "div2"]}},
            'recipe `r`: `data.levels[1]` = "div2" is not allowed: it takes `add2` or `sub2` or `add3` or `sub3` '
            "or `steps2` or `steps3` or `steps4` or `mul2` or `mul3`",
        ),
    ],
)
def test_refused_values(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(**tables)
    assert caught.value.message == message
    assert caught.value.exit_code == 2


def test_a_missing_table_is_named() -> None:
    with pytest.raises(UserError) as caught:
        recipe_io.check({"model": {"path": "m"}, "train": {"steps": 1}}, "r")
    assert caught.value.message == "recipe `r`: `data` is missing: a table is needed"


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        checked(train={"steps": 0, "stepz": 3})
    assert caught.value.message.splitlines() == [
        "recipe `r`:",
        "  `train.steps` = 0 is not allowed: it takes a whole number greater than 0",
        "  unknown key `train.stepz` (= 3)",
    ]
    assert caught.value.hint == "did you mean `train.steps`?"


def test_deterministic_alone_means_staleness_0() -> None:
    stale = checked(train={"max_staleness": 8})
    exact = checked(train={"max_staleness": 8}, launch={"deterministic": True})
    assert (stale.effective_staleness, exact.effective_staleness) == (8, 0)


def test_batch_sequences() -> None:
    assert checked(train={"batch_groups": 3}, rollout={"group_size": 5}).batch_sequences == 15


def test_json_of_a_resolved_recipe_reads_back_equal() -> None:
    recipe = checked(train={"betas": [0.8, 0.9]}, expected={"source": "s", "machine": "m", "avg_at_n_last": 0.5})
    assert Recipe.model_validate(recipe_io.to_document(recipe)) == recipe
    assert Recipe.model_validate_json(recipe_io.to_json(recipe)) == recipe
