"""The benchmarks by name: where each lies, how its items read, how many there are and how often each is sampled.

The number of items and the content hash are a benchmark's identity: `data/benchmarks.py` refuses what differs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.config.recipe_data import DataTable

PACKED = (".gz", ".zst")
"""Suffixes of compressed files."""
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
SUFFIXES = (*FORMATS, *(f"{name}{packed}" for name in FORMATS for packed in PACKED))
"""Suffixes of the files that problems are read from."""

MATH_PROMPT = "{question}\nLet's think step by step. Please put your final answer within \\boxed{}."
"""What a benchmark of written mathematics asks."""


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub, and which of its columns are the question and the answer."""

    hub_id: str
    split: str
    question_fields: tuple[str, ...] = ("problem", "question")
    answer_fields: tuple[str, ...] = ("answer",)
    config: str | None = None
    final_after: str | None = None
    """The answer is what follows this mark in the answer column (GSM8K's `####`)."""


@dataclass(frozen=True)
class BenchmarkSpec:
    """What is known of a benchmark before it is loaded."""

    name: str
    counts: tuple[int, ...]
    """Accepted numbers of items: one, or one per copy in circulation; () takes any (a set of one's own)."""
    samples: int
    """Samples per item, unless the recipe says otherwise."""
    hub: HubSet | None
    """None: generated."""
    prompt: str = MATH_PROMPT
    """Empty: the recipe's `data.template`."""
    licence: str = ""
    file_names: tuple[str, ...] = ()
    """Names of a local copy besides the benchmark's own."""
    hashes: tuple[str, ...] = ()
    """Accepted `content_hash`es of a copy with the first of `counts`; () when nobody could load the set yet: then the
    number of items alone is checked, and that is said."""
    hub_loaded: bool = False
    """Whether the Hub copy was ever loaded and found to have that hash; until then it is marked `not run`."""
    own: DataTable | None = None
    """How the rows of a set of one's own read; `hub` is None then."""
    held_out: bool = False
    """It is what `own`, a training source, holds out."""

    @property
    def generated(self) -> bool:
        """Whether its items are drawn, not read."""
        return self.hub is None and self.own is None


_MAA = "problems (c) Mathematical Association of America, collection "
_SPECS = (
    BenchmarkSpec("arithmetic-heldout", (256,), 8, None, "{question}", "generated"),
    BenchmarkSpec("arithmetic-steps-heldout", (256,), 4, None, "{question}", "generated"),
    BenchmarkSpec("arithmetic-sums-heldout", (96,), 8, None, "", "generated"),
    BenchmarkSpec("arithmetic-products-heldout", (128,), 4, None, "{question}", "generated"),
    BenchmarkSpec(
        "aime24", (30,), 16, HubSet("HuggingFaceH4/aime_2024", "train"),
        licence=f"{_MAA}MIT", hashes=("50c69a59aea22c18",),
    ),
    BenchmarkSpec(
        "aime25", (30,), 16, HubSet("math-ai/aime25", "test"), licence=f"{_MAA}Apache-2.0", hashes=("fff8428f4392271c",)
    ),
    BenchmarkSpec("amc", (45,), 16, HubSet("rawsh/2024_AMC12", "train"), licence=f"{_MAA}without a stated licence"),
    BenchmarkSpec(
        "amc23", (40,), 16, HubSet("math-ai/amc23", "test"), licence=f"{_MAA}MIT", hashes=("16bb92275825d6f5",)
    ),
    BenchmarkSpec(
        "amc22_23", (83,), 16, HubSet("AI-MO/aimo-validation-amc", "train"),
        licence=f"{_MAA}MIT", hashes=("54f5b7f5a7402846",),
    ),
    BenchmarkSpec(
        "minerva", (272,), 4, HubSet("math-ai/minervamath", "test"), licence="MIT",
        hashes=("470b211dc30dd34a", "12d7ec73a5750e47"),  # the second: 62 golds rewritten in form only
    ),
    BenchmarkSpec(
        "math500", (500,), 4, HubSet("HuggingFaceH4/MATH-500", "test"), licence="MIT", hashes=("129ab1775a34c3be",)
    ),
    BenchmarkSpec(
        "gsm8k", (1319,), 4, HubSet("openai/gsm8k", "test", config="main", final_after="####"), licence="MIT",
        file_names=("gsm8k_test",), hashes=("583ef2eb41dca8b6",),
    ),
    BenchmarkSpec(
        "olympiadbench", (675, 674), 4,
        HubSet("math-ai/olympiadbench", "test", answer_fields=("answer", "final_answer")),
        licence="MIT", hashes=("0e04963d599be364",),
    ),
)  # fmt: skip
BENCHMARKS: dict[str, BenchmarkSpec] = {spec.name: spec for spec in _SPECS}


def is_path(name: str) -> bool:
    """Whether a benchmark is named by where it lies: `my_set.jsonl`, `sets/mine.parquet`, a directory, a Hub id."""
    return "/" in name or name.lower().endswith(SUFFIXES)


def own_sets(recipe: Recipe) -> dict[str, BenchmarkSpec]:
    """The benchmarks that a recipe brings by name: `[eval.sets.NAME]`, and what its training sources hold out."""
    from astracli.config import recipe_data

    named = {
        name: BenchmarkSpec(
            name, (), table.samples, None, "", "your own", own=_own(recipe_data.of(recipe.data, table), table.split)
        )
        for name, table in recipe.eval.sets.items()
    }
    held = {
        name: BenchmarkSpec(name, (), 4, None, "", "your own", own=table, held_out=True)
        for name, table in recipe_data.held_out(recipe.data).items()
    }
    return named | held


def _own(table: DataTable, split: str | None) -> DataTable:
    return table.model_copy(update={"split": split or "", "holdout": 0.0, "mix": []})


def get(name: str, recipe: Recipe | None = None) -> BenchmarkSpec:
    """A benchmark by name, one of the recipe's, or a set of one's own by where it lies. Raises UserError with the
    nearest name."""
    own = own_sets(recipe) if recipe is not None else {}
    if name in own:
        return own[name]
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if is_path(name):
        from astracli.config.recipe_data import DataTable

        table = recipe.data if recipe is not None else DataTable(source=name)
        short = Path(name).name
        while short.lower().endswith((*FORMATS, *PACKED)):
            short = Path(short).stem
        read = table.model_copy(update={"source": name, "config": None, "revision": None})
        return BenchmarkSpec(short, (), 4, None, "", "your own", own=_own(read, None))
    near = difflib.get_close_matches(name, [*BENCHMARKS, *own], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "choose from the list"
    raise UserError(f"there is no benchmark `{name}`: {', '.join([*BENCHMARKS, *own])}", hint)
