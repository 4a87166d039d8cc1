"""Sets of problems in a recipe beside `[data]`: several training sources, shown examples, benchmarks of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from astracli.config.benchmarks import BENCHMARKS
from astracli.config.recipe_run import Table

if TYPE_CHECKING:
    from astracli.config.recipe import DataTable

NonEmpty = Annotated[str, Field(min_length=1)]
Level = Literal["add2", "sub2", "add3", "sub3", "steps2", "steps3", "steps4"]
GENERATED = "arithmetic"
"""The source that is no file: `data/arithmetic.py`."""
HOLDOUT = "holdout"
"""Name of the benchmark that `data.holdout` makes; `holdout:NAME` of one source among several."""


class ShotTable(Table):
    """A question with its answer, shown before every question."""

    question: str
    """Put into `data.template`, as the question of a problem is."""
    answer: str
    """What the assistant's turn says."""


class SetTable(Table):
    """One more set of problems. What it leaves out is as `[data]` says, except `config` and `revision`."""

    source: str = Field(min_length=1)
    """As `data.source`."""
    config: str | None = None
    """As `data.config`."""
    split: str | None = None
    """As `data.split`."""
    revision: str | None = None
    levels: list[Level] | None = Field(default=None, min_length=1)
    question_field: str | None = None
    answer_field: str | None = None
    template: str | None = None
    system: str | None = None
    few_shot: list[ShotTable] | None = None
    reward: str | None = None
    """What judges its answers; in the place of `data.rewards` too."""
    right_at: float | None = None
    """As `data.right_at`, which does not count where `reward` is another one."""


class MixTable(SetTable):
    """One of several training sources, `[[data.mix]]`. What it leaves out is as `[data]` says, except `config` and
    `revision`."""

    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """What metrics, samples and its benchmark call it; None is the end of `source`."""
    weight: PositiveFloat = 1.0
    """Its share of the prompts is this over the sum of all weights, to a thousandth, at any place of the sequence."""
    holdout: NonNegativeFloat | None = None
    """As `data.holdout`."""


class EvalSetTable(SetTable):
    """A benchmark of one's own, `[eval.sets.NAME]`. What it leaves out is as `[data]` says, except `config`, `revision`
    and `split`."""

    split: str | None = None
    """None is `test` where there is one, else the only split."""
    samples: PositiveInt = 4
    """Samples per item, unless `eval.samples` says otherwise."""


def sets(data: DataTable) -> Mapping[str, DataTable]:
    """The training sources by name, each as a table of its own; without a mix one, which is called ""."""
    return {mix_name(entry): of(data, entry) for entry in data.mix} or {"": data}


def weights(data: DataTable) -> Mapping[str, float]:
    """Of `sets`; they need not sum to 1."""
    return {mix_name(entry): entry.weight for entry in data.mix} or {"": 1.0}


def held_out(data: DataTable) -> Mapping[str, DataTable]:
    """Benchmarks that sources hold out: name -> the source."""
    return {f"{HOLDOUT}:{name}" if name else HOLDOUT: table for name, table in sets(data).items() if table.holdout}


def of(data: DataTable, entry: SetTable) -> DataTable:
    """The table of one more set: its own values, else `data`'s."""
    given = {key: value for key in type(entry).model_fields if (value := getattr(entry, key)) is not None}
    own = {key: value for key, value in given.items() if key in type(data).model_fields}
    base = data if entry.reward is None else data.by(entry.reward)
    return base.model_copy(update={"config": None, "revision": None, "mix": [], **own})


def contradiction(data: DataTable) -> str | None:
    """What contradicts itself here, as a sentence; None when nothing does."""
    if not data.source and not data.mix:
        return "`data.source` is missing: where the problems come from"
    names = Counter(map(mix_name, data.mix))
    if twice := [name for name, count in names.items() if count > 1]:
        return f"two sources of data.mix are called `{twice[0]}`: give them a `name` each"
    for name, table in sets(data).items():
        where = f"data.mix `{name}`: " if name else "data."
        if "{" not in table.template:
            return f"{where}template = {table.template!r} has neither {{question}} nor a column in it"
        if table.holdout >= 1 and not table.holdout.is_integer():
            return f"{where}holdout = {table.holdout} is neither a share below 1 nor a whole number of questions"
        if table.holdout and table.source == GENERATED:
            return f"{where}holdout: `{GENERATED}` holds problems out by itself: the benchmark arithmetic-heldout"
    return None


def set_problem(named: Mapping[str, EvalSetTable]) -> str | None:
    """What is wrong with benchmarks of one's own, as a sentence."""
    for name, table in named.items():
        if name in BENCHMARKS:
            return f"eval.sets.{name}: a known benchmark has that name"
        if table.source == GENERATED:
            return f"eval.sets.{name}: `{GENERATED}` has its own benchmarks, such as arithmetic-heldout"
    return None


def mix_name(entry: MixTable) -> str:
    """`name`, else the end of `source` without suffixes: `openai/gsm8k` is gsm8k, `a/b.jsonl.gz` is b."""
    return entry.name or PurePath(entry.source).name.split(".")[0] or entry.source
