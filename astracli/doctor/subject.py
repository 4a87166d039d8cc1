"""What every group of checks gets and gives: a subject (facts, recipe, what the recipe comes to) and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
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
class Subject:
    """What is judged. Nothing in it changes, and no check looks anywhere else. What a recipe comes to on these facts is
    None from the first refusal on."""

    facts: Machine
    recipe: Recipe | None = None
    host: str | None = None
    """Whose facts these are, by its name in launch.hosts; None: the first host."""
    config: Mapping[str, Any] | None = None
    """config.json of the recipe's checkpoint, when it is known."""
    adapter: ModelAdapter | None = None
    choice: BackendChoice | None = None
    plan: LaunchPlan | None = None
    refusal: UserError | None = None

    @property
    def cuda(self) -> bool:
        """The recipe runs on GPUs; after a refusal, what the recipe says."""
        if self.choice is not None:
            return self.choice.device == "cuda"
        return self.recipe is not None and self.recipe.device == "cuda"

    @property
    def engine(self) -> Engine | None:
        """What the recipe generates with; None when that is refused."""
        try:
            return engines.of(self.recipe) if self.recipe is not None else None
        except UserError:
            return None

    def case(self, engine: Engine) -> Case:
        """What is asked of an engine, of its own environment."""
        return Case(
            self.facts,
            "cuda" if self.cuda else "cpu",
            self.recipe,
            self.adapter,
            self.config,
            attention=self.choice.serving_attention if self.choice is not None else None,
            wanted=self.recipe is not None and engine is self.engine,
        )

    @property
    def known_config(self) -> Mapping[str, Any] | None:
        """The config, or the sizes of a model that the adapter knows when its config.json is not here."""
        if self.config or self.adapter is None or self.recipe is None:
            return self.config
        return self.adapter.known_configs.get(self.recipe.model.path)

    @property
    def hybrid(self) -> bool:
        return self.adapter is not None and self.adapter.hybrid

    def bad(self, needed: bool) -> Status:
        """`fail` for what this recipe needs, `warn` for all else."""
        return "fail" if needed and self.recipe is not None else "warn"


def subject(recipe: Recipe | None, facts: Machine, fleet: Mapping[str, Machine] = MappingProxyType({})) -> Subject:
    """Facts and recipe made ready for the checks: adapter, backends and plan. A refusal is kept, not raised. `fleet`:
    the other hosts, as far as they are known."""
    if recipe is None:
        return Subject(facts)
    found = Subject(facts, recipe, config=_config(recipe, facts))
    try:
        found = replace(found, adapter=(adapter := registry.resolve(recipe, found.config)))
        found = replace(found, choice=(choice := choose(adapter, facts, recipe, found.config)))
        plan = build(recipe, adapter, choice, facts, command=recipe.command, config=found.config, fleet=fleet)
        return replace(found, plan=plan)
    except UserError as error:
        return replace(found, refusal=error)


def _config(recipe: Recipe, facts: Machine) -> Mapping[str, Any] | None:
    """From the document; a model that ships with the package is on every machine."""
    from astracli.data import fetch

    known = facts.checkpoint
    if known is not None and known.path == recipe.model.path:
        return known.config
    if recipe.model.path.startswith(fetch.BUNDLED_PREFIX):
        return read_config(fetch.bundled(recipe.model.path))
    return None


def optional(facts: Machine, name: str, group: str) -> Check:
    """A package that may be absent; when it is there, it must be importable."""
    if (wrong := flaw(facts, name)) is not None:
        return Check(name, group, "warn", *wrong)
    version = facts.package(name).version
    return Check(name, group, "ok" if version else "skip", version or "not installed")
