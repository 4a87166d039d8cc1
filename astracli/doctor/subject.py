"""What every group of checks gets and gives: a subject (facts, recipe, what the recipe comes to) and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from astracli.backends.choice import BackendChoice, choose
from astracli.config.recipe import Recipe
from astracli.engines import registry as engines
from astracli.engines.contract import Case, Engine
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.machine.findings import Check, Status, flaw
from astracli.models import registry
from astracli.models.adapter import ModelAdapter, read_config
from astracli.plan.build import build
from astracli.plan.types import LaunchPlan


@dataclass(frozen=True)
class Fit:
    """What a recipe comes to on these facts; parts are None from the first refusal on."""

    adapter: ModelAdapter | None = None
    choice: BackendChoice | None = None
    plan: LaunchPlan | None = None
    refusal: UserError | None = None


@dataclass(frozen=True)
class Subject:
    """What is judged. Nothing in it changes, and no check looks anywhere else."""

    facts: Machine
    recipe: Recipe | None = None
    config: Mapping[str, Any] | None = None
    """config.json of the recipe's checkpoint, when it is known."""
    fit: Fit = Fit()

    @property
    def cuda(self) -> bool:
        """The recipe runs on GPUs; after a refusal, what the recipe says."""
        if self.fit.choice is not None:
            return self.fit.choice.device == "cuda"
        return self.recipe is not None and self.recipe.device == "cuda"

    @property
    def engine(self) -> Engine | None:
        """What the recipe generates with; after a refusal, what it says."""
        if self.recipe is None:
            return None
        try:
            return engines.of(self.recipe)
        except UserError:
            return None

    def case(self, engine: Engine) -> Case:
        """What is asked of an engine, of its own environment."""
        choice = self.fit.choice
        return Case(
            self.facts,
            "cuda" if self.cuda else "cpu",
            self.recipe,
            self.fit.adapter,
            self.config,
            attention=choice.serving_attention if choice is not None else None,
            wanted=self.recipe is not None and engine is self.engine,
        )

    @property
    def known_config(self) -> Mapping[str, Any] | None:
        """Sizes of a model that the adapter knows, for when its config.json is not here."""
        if self.fit.adapter is None or self.recipe is None:
            return None
        return self.fit.adapter.known_configs.get(self.recipe.model.path)

    @property
    def hybrid(self) -> bool:
        return self.fit.adapter is not None and self.fit.adapter.hybrid

    def bad(self, needed: bool) -> Status:
        """`fail` for what this recipe needs, `warn` for all else."""
        return "fail" if needed and self.recipe is not None else "warn"


def subject(recipe: Recipe | None, facts: Machine) -> Subject:
    """Facts and recipe made ready for the checks."""
    if recipe is None:
        return Subject(facts)
    config = _config(recipe, facts)
    return Subject(facts, recipe, config, judge(recipe, facts, config))


def _config(recipe: Recipe, facts: Machine) -> Mapping[str, Any] | None:
    """From the document; a model that ships with the package is on every machine."""
    from astracli.data import fetch

    known = facts.checkpoint
    if known is not None and known.path == recipe.model.path:
        return known.config
    if recipe.model.path.startswith(fetch.BUNDLED_PREFIX):
        return read_config(fetch.bundled(recipe.model.path))
    return None


def judge(recipe: Recipe, facts: Machine, config: Mapping[str, Any] | None) -> Fit:
    """Adapter, backends and plan of a recipe; a refusal is kept, not raised."""
    adapter, choice = None, None
    try:
        adapter = registry.resolve(recipe, config)
        choice = choose(adapter, facts, recipe, config)
        return Fit(adapter, choice, build(recipe, adapter, choice, facts, config=config))
    except UserError as error:
        return Fit(adapter, choice, None, error)


def optional(facts: Machine, name: str, group: str) -> Check:
    """A package that may be absent, and must not lie when it is there."""
    wrong = flaw(facts, name)
    if wrong is not None:
        return Check(name, group, "warn", wrong.value, wrong.why, wrong.fix)
    version = facts.package(name).version
    return Check(name, group, "ok" if version else "skip", version or "not installed")


def unknown(name: str, group: str) -> Check:
    return Check(name, group, "skip", "not in this document")
