"""What every group of checks gets and gives: a subject (facts, recipe, what the recipe comes to) and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from astracli.backends import choice as backend
from astracli.backends.choice import BackendChoice
from astracli.config.recipe import Recipe
from astracli.errors import UserError
from astracli.machine.facts import Machine
from astracli.models import registry
from astracli.models.adapter import ModelAdapter, read_config
from astracli.plan import build as plan
from astracli.plan.types import LaunchPlan

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    name: str
    group: str
    status: Status
    value: str
    """What was found."""
    why: str = ""
    """Why it matters, one line; empty when all is well and there is nothing to say."""
    fix: str = ""
    """The next command or setting."""


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
        if self.recipe is None:
            return False
        asked = self.recipe.resources
        return asked.device == "cuda" or (asked.device == "auto" and asked.rollout_gpus + asked.train_gpus > 0)

    @property
    def sglang(self) -> bool:
        """The recipe generates with SGLang; after a refusal, what the recipe says."""
        if self.fit.choice is not None:
            return self.fit.choice.engine == "sglang"
        return self.cuda and self.recipe is not None and self.recipe.rollout.engine != "embedded"

    @property
    def hybrid(self) -> bool:
        return self.fit.adapter is not None and self.fit.adapter.hybrid

    @property
    def foreign_engine(self) -> bool:
        """The engine has an interpreter or a PYTHONPATH of its own: its packages are not the trainer's."""
        return self.recipe is not None and self.recipe.resources.engine.foreign

    @property
    def serving(self) -> Machine | None:
        """The facts as the engine's interpreter has them; None when it is another one and nothing is known of it."""
        return self.facts.as_engine(self.foreign_engine)

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
        choice = backend.choose(adapter, facts, recipe, config)
        return Fit(adapter, choice, plan.build(recipe, adapter, choice, facts, config=config))
    except UserError as error:
        return Fit(adapter, choice, None, error)


class Flaw(NamedTuple):
    """What is wrong with a package; the fields of a `Check`."""

    value: str
    why: str
    fix: str


def flaw(facts: Machine, name: str) -> Flaw | None:
    """Of a package that looks installed and cannot be imported; None when it does not lie."""
    package = facts.package(name)
    if package.importable_spec and not package.origin:
        why = "a namespace stub, a folder without a module: `import` succeeds and finds nothing in it"
        return Flaw("stub", why, f"`pip install {name}`, or remove the empty folder")
    if package.version and not package.usable:
        why = "installed by its metadata, but there is no module to import"
        return Flaw(package.version, why, f"`pip install --force-reinstall {name}`")
    return None


def optional(facts: Machine, name: str, group: str) -> Check:
    """A package that may be absent, and must not lie when it is there."""
    wrong = flaw(facts, name)
    if wrong is not None:
        return Check(name, group, "warn", wrong.value, wrong.why, wrong.fix)
    version = facts.package(name).version
    return Check(name, group, "ok" if version else "skip", version or "not installed")


def unknown(name: str, group: str) -> Check:
    return Check(name, group, "skip", "not in this document")
