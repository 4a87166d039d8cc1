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
    """An example question with its answer, shown before every question."""

    question: str
    """It is put into `data.template`, like the question of a problem."""
    answer: str
    """The assistant's answer."""


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
    """The reward for this set. It also replaces `data.rewards`."""
    right_at: float | None = None
    """As `data.right_at`, which does not apply if `reward` is set here."""


class MixTable(SetTable):
    """One of several training sources, `[[data.mix]]`. Keys that are left out are taken from `[data]`, except `config`
    and `revision`."""

    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Its name in metrics and samples, and in the name of its benchmark. None: the end of `source`."""
    weight: PositiveFloat = 1.0
    """Its share of the prompts is this weight over the sum of all weights. The share is kept to a thousandth at every
    point of the run."""
    holdout: NonNegativeFloat | None = None
    """As `data.holdout`."""


class EvalSetTable(SetTable):
    """A benchmark of your own, `[eval.sets.NAME]`. Keys that are left out are taken from `[data]`, except `config`,
    `revision` and `split`."""

    split: str | None = None
    """None: `test` if there is one, else the only split."""
    samples: PositiveInt = 4
    """Samples per item, unless `eval.samples` sets another number."""


class CurriculumTable(Table):
    """Prefer prompts whose solve rate lies in a band. The solve rate is the mean reward of the recent groups of the
    same kind."""

    low: float = Field(default=0.2, ge=0.0, le=1.0)
    """Lower end of the band."""
    high: float = Field(default=0.8, ge=0.0, le=1.0)
    """Upper end of the band."""
    candidates: int = Field(default=4, ge=2, le=64)
    """Each prompt is chosen from this many. The others are skipped in this epoch."""
    outside: float = Field(default=0.1, gt=0.0, le=1.0)
    """Weight of a prompt outside the band. A prompt inside the band, or one that was never used, has weight 1."""
    window: PositiveInt = 16
    """How many recent groups of a kind count. A kind is a level of `arithmetic`; for other sources each problem is a
    kind of its own."""


class DataTable(RewardKeys):
    source: str = ""
    """Where the problems come from: `arithmetic` (generated), a registered name, a file (.jsonl, .json, .csv, .tsv,
    .parquet, .arrow, each also with .gz or .zst), a directory that `datasets` can read, or a Hub data set id."""
    config: str | None = None
    """Configuration of a Hub data set, or of a directory that has several."""
    split: str = "train"
    """Split of a directory or a Hub data set."""
    path: str | None = None
    """Directory with local copies of training sets and benchmarks: NAME.jsonl, NAME.parquet or a `datasets` directory
    NAME, in the directory itself or in its subdirectories `train` and `eval`. None: the directory that the environment
    variable ASTRA_DATA_DIR names."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    levels: list[Level] = Field(default=["add2", "sub2", "add3", "sub3"], min_length=1)
    """Difficulty levels of the generated arithmetic problems, drawn uniformly. Other sources ignore it."""
    question_field: str = "problem"
    """Column with the question: text, or chat turns (a list of `role` and `content`, or such a list as JSON text). If a
    row does not have it, chat turns are read from `messages`. `a.b` is the field `b` inside the column `a`."""
    answer_field: str = "answer"
    """Column with the right answer. Empty: the rows have no answer, and the reward needs none."""
    template: str = "{question}"
    """Text of the user turn. `{question}` is the question; any other column can be used by its name. Other braces are
    left as they are."""
    system: str | None = None
    """Text of the system turn, for rows that have none of their own. It may use columns, as `template` does."""
    few_shot: list[ShotTable] = Field(default=[])
    """Example questions with answers, `[[data.few_shot]]`. They are the first turns of every conversation."""
    markup: Literal["text", "tokens"] = "text"
    """How a special token of the model, such as `<|im_end|>`, is read in a row or in the texts of the recipe: as
    ordinary text, or as the token."""
    max_prompt_tokens: PositiveInt = 2000
    """Longer prompts are left out; the run says how many."""
    mix: list[MixTable] = Field(default=[])
    """Several sources, `[[data.mix]]`. `source` is then not used."""
    holdout: NonNegativeFloat = 0.0
    """Questions that are not trained on and become the benchmark `holdout`: a share if below 1, else a number. A hash
    of the question's text decides, so every run holds out the same questions, with all rows that ask them."""
    curriculum: CurriculumTable | None = None
    """None: prompts in shuffled order. A table: prefer prompts that are solved sometimes."""
    decontaminate: Literal["report", "remove", "off"] = "report"
    """What happens to training problems that are also items of `eval.benchmarks`: they are counted and reported
    (`report`), also left out (`remove`), or not looked for (`off`)."""


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
