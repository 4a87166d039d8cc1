"""The table `[data]` and the sets of problems beside it: training sources, shown examples, benchmarks of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from astracli.config.benchmarks import BENCHMARKS
from astracli.config.recipe_rewards import RewardKeys
from astracli.config.recipe_run import Table

Level = Literal["add2", "sub2", "add3", "sub3", "steps2", "steps3", "steps4", "mul2", "mul3"]
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


class CurriculumTable(Table):
    """Prompts by solve rate (mean reward of a kind's recent groups): those in the band are preferred."""

    low: float = Field(default=0.2, ge=0.0, le=1.0)
    high: float = Field(default=0.8, ge=0.0, le=1.0)
    candidates: int = Field(default=4, ge=2, le=64)
    """Prompts of which one is asked; the others are passed over in this epoch."""
    outside: float = Field(default=0.1, gt=0.0, le=1.0)
    """Weight of a prompt outside the band; one inside, or never asked, weighs 1."""
    window: PositiveInt = 16
    """Latest groups of a kind (a level of `arithmetic`, else one problem) that count."""


class DataTable(RewardKeys):
    source: str = ""
    """`arithmetic` (generated), a registered name, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, and each of
    them with .gz or .zst), a directory that `datasets` reads, or a Hub data set id."""
    config: str | None = None
    """Which configuration of a Hub data set, or of a directory that has several."""
    split: str = "train"
    """Of a directory or a Hub data set."""
    path: str | None = None
    """Directory that holds local copies of training sets and benchmarks: NAME.jsonl, NAME.parquet or a `datasets`
    directory NAME, itself or in its `train` and `eval`. None is the environment's ASTRA_DATA_DIR."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    levels: list[Level] = Field(default=["add2", "sub2", "add3", "sub3"], min_length=1)
    """Difficulty levels of the generated arithmetic family, drawn uniformly (other sources ignore it)."""
    question_field: str = "problem"
    """Column of the question: text, or chat turns (a list of `role` and `content`, or such a list as JSON text). A row
    without it may have its turns in `messages`. `a.b` is a field `b` inside a column `a`."""
    answer_field: str = "answer"
    """Column of the right answer; empty: the rows have none, and the reward needs none."""
    template: str = "{question}"
    """What the user turn says: `{question}`, and any column of the row by its name. Other braces stay as they are."""
    system: str | None = None
    """The system turn, of rows that bring none of their own; may name columns as `template` does."""
    few_shot: list[ShotTable] = Field(default=[])
    """Questions with answers, `[[data.few_shot]]`: earlier turns of every conversation."""
    markup: Literal["text", "tokens"] = "text"
    """What a special token of the model (`<|im_end|>`) is that stands in a row, or in the recipe's own words: the text
    that it is written as, or the token itself."""
    max_prompt_tokens: PositiveInt = 2000
    """Longer prompts are left out and counted."""
    mix: list[MixTable] = Field(default=[])
    """Several sources, `[[data.mix]]`; `source` is not asked then."""
    holdout: NonNegativeFloat = 0.0
    """Questions that are never trained on and make the benchmark `holdout`: a share below 1, or how many. A question is
    chosen by a hash of its text, so the same ones are held out in every run, with all rows that ask them."""
    curriculum: CurriculumTable | None = None
    """None asks prompts in their shuffled order; a table prefers those that are solved sometimes."""
    decontaminate: Literal["report", "remove", "off"] = "report"
    """Training problems that are also items of `eval.benchmarks`: counted and said, left out, or not looked for."""


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
