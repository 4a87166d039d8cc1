"""A small engine: transformers computes, the standard library serves. `rollout.engine = "plain"`."""

from __future__ import annotations

import re

from astracli.config.recipe import Recipe
from astracli.config.recipe_run import Table
from astracli.engines.contract import Case, Engine, FailureHint, Serving, Start
from astracli.errors import UserError


class PlainTable(Table):
    batch: int = 256
    """Sequences that are decoded together."""


class Plain(Engine):
    name = "plain"
    settings = PlainTable
    fp32_on = frozenset({"cpu"})
    hints = (FailureHint(re.compile("not enough memory"), "out of memory", "lower rollout.plain.batch"),)

    def start(self, recipe: Recipe) -> Start:
        return Start("astra_plain.server", preload=("astra_plain.server",))

    def choose(self, case: Case) -> Serving:
        if case.device != "cpu":
            raise UserError("rollout.engine = plain serves on a CPU alone", "use `--set rollout.engine=auto`")
        return Serving(("sdpa", "what transformers computes exactly"), ("torch", "what transformers has"))


ENGINE = Plain()
