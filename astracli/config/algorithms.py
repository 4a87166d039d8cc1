"""The door `astra.algorithms`: which algorithms are installed, what a recipe must know of one, the table `[algorithm]`.

An algorithm is an entry point in this group whose object is an `astracli.rl.losses.Algorithm`; those of this package
come in by the same door. Only what a recipe names is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Self, cast

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from astracli.config import doors
from astracli.config.recipe_run import Table
from astracli.errors import UserError

GROUP = "astra.algorithms"


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """What a recipe must know of an algorithm; `astracli.rl.losses.Algorithm` adds how it computes."""

    settings: type[Table] = Table
    """Its own settings: the table `[algorithm.NAME]`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its own values of keys of `[algorithm]`, where a recipe says nothing."""
    teacher: Callable[[Any], str] | None = None
    """Its settings -> the model whose log-probabilities of every token it needs; None: none."""
    smallest_group: int = 2
    """Samples of a prompt that its advantage needs."""
    excluded: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Values of keys of `[algorithm]` that would make its name untrue: key -> (value, what that does)."""


@cache
def installed() -> Mapping[str, list[metadata.EntryPoint]]:
    """Name -> its entry points, by name; more than one when several packages bring an algorithm of that name."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in doors.points(GROUP):
        found.setdefault(point.name, []).append(point)
    return found


@cache
def find(name: str) -> AlgorithmSettings:
    """The algorithm of that name. Raises UserError: not installed (with the nearest), broken, or there twice."""
    points = installed().get(name, [])
    if not points:
        near = "".join(f"did you mean `{n}`? " for n in difflib.get_close_matches(name, installed(), n=1, cutoff=0.5))
        known = ", ".join(installed()) or "none, not even astra's own: install it again (`pip install -e .`)"
        raise UserError("there is no such algorithm", f"{near}known: {known}")
    packages = " and ".join(f"`{point.dist.name if point.dist else 'unknown'}`" for point in points)
    if len(points) > 1:
        raise UserError(f"it comes from several packages: {packages}", "uninstall all but one of them")
    try:
        found = points[0].load()
    except Exception as error:  # a stranger's module may raise anything while it is imported
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"package {packages} is broken: {said}", "mend or uninstall it") from None
    if not isinstance(found, AlgorithmSettings):
        said = f"{points[0].value} of package {packages} is a {type(found).__name__}"
        raise UserError(f"{said}, not an astracli.rl.losses.Algorithm", "mend or uninstall it")
    return found


class AlgorithmTable(Table):
    """The loss and the advantage (docs/algorithms.md). These settings are common to all algorithms. Settings of one
    algorithm are in its own table, `[algorithm.NAME]`. Tables of other algorithms are checked but not used."""

    name: str = "m2po"
    """An entry point in the group `astra.algorithms`. This package has `m2po`, `grpo`, `dapo`, `dr_grpo`, `gspo`,
    `cispo`, `decoupled`, `tis` and `distill`. Settings that a recipe leaves out take the algorithm's own defaults."""
    mismatch_cap: float | None = Field(default=None, ge=1.0)
    """Corrects for an engine whose probabilities differ from the trainer's, with any algorithm: tokens of the current
    version have the weight min(pi_trainer / pi_engine, mismatch_cap). 2 is usual. None: off."""
    overlong_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last part of the available length in which the reward falls linearly by up to `overlong_penalty`, with any
    algorithm. 0: off; dapo: 0.2. The available length is `rollout.max_new_tokens`, or less if `rollout.context_length`
    ends before."""
    overlong_penalty: PositiveFloat = 0.5
    """Subtracted from the reward of a completion that uses the whole available length. 0.5 with rewards 0 and 1 is the
    same as DAPO's 1 with rewards -1 and 1."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL estimate (k3) to the initial model. 0: no reference model is loaded."""
    batch_norm_advantage: bool = False
    """Normalise the advantages once more over the batch."""
    drop_equal_groups: bool = True
    """Leave out groups in which all rewards are equal. They have no gradient."""

    @property
    def teacher(self) -> str | None:
        """The model whose log-probabilities the algorithm needs; None for most."""
        asked = find(self.name).teacher
        return asked(self.own) if asked is not None else None

    @property
    def own(self) -> Any:
        """The chosen algorithm's own settings."""
        return getattr(self, self.name)

    @classmethod
    def brought(cls) -> dict[str, type[Table]]:
        found = {}
        for name in installed():
            with suppress(UserError):
                found[name] = find(name).settings
        return found

    @model_validator(mode="wrap")
    @classmethod
    def _of_the_algorithm(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A table with the own settings of the algorithm that is named."""
        name = values.get("name", cls.model_fields["name"].default) if isinstance(values, dict) else None
        if cls is not AlgorithmTable or not isinstance(name, str):
            return handler(values)
        chosen = _find_at("name", name, name)
        others = {key: value for key, value in values.items() if key != name and key in installed()}
        for key, value in others.items():
            _find_at(key, key, value)
        _extended(Table, *others).model_validate(others)
        shared = {key: value for key, value in values.items() if key not in others}
        whole, moved = _extended(AlgorithmTable, name), []
        for key in [key for key in shared if key not in whole.model_fields]:
            owners = [name] if key in chosen.settings.model_fields else []
            owners = owners or [other for other, its in cls.brought().items() if key in its.model_fields]
            if owners:
                places = " or ".join(f"`algorithm.{owner}.{key}`" for owner in owners)
                moved.append(_refused(key, shared[key], f"is a setting of one algorithm: it is now {places}", None))
        if moved:
            raise ValidationError.from_exception_data("algorithm", moved)
        return cast(Self, whole.model_validate({**chosen.defaults, name: {}, **shared}))


@cache
def _extended(base: type[Table], *names: str) -> type[Table]:
    """A table with those of the algorithms that are named."""
    return create_model(base.__name__, __base__=base, **{name: (find(name).settings, ...) for name in names})  # type: ignore[call-overload]


def _find_at(key: str, name: str, value: Any) -> AlgorithmSettings:
    """`find`; its error is one of `algorithm.KEY`."""
    try:
        return find(name)
    except UserError as error:
        line = _refused(key, value, f"is not allowed: {error.message}", error.hint)
        raise ValidationError.from_exception_data("algorithm", [line]) from None


def _refused(key: str, value: Any, message: str, hint: str | None) -> InitErrorDetails:
    """What `config.schema.complaint` turns into "`algorithm.KEY` = VALUE MESSAGE" and the hint."""
    said = PydanticCustomError("refused", "{message}", {"message": message, "hint": hint})
    return InitErrorDetails(type=said, loc=(key,), input=value)
