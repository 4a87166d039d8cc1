"""Benchmarks made local, checked and loaded: the table of them is `config/benchmarks.py`.

A set that is cut, doubled or changed is refused. A set of one's own goes by where it lies (`--benchmark my_set.csv`) or
stands in `[eval.sets.NAME]`; it is taken as it is, read as the recipe's training problems are and judged by their
reward. Where no hash is recorded (`amc`, and OlympiadBench's copy of 674 items) the count alone is checked,
and `fetch` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from astracli.config.benchmarks import MATH_PROMPT, BenchmarkSpec, get
from astracli.data import arithmetic, datasets
from astracli.data.content_hash import content_hash
from astracli.data.prompts import Problem
from astracli.data.turns import PromptFormat, Turn
from astracli.errors import UserError

if TYPE_CHECKING:
    from astracli.config.recipe import Recipe
    from astracli.config.recipe_data import DataTable


@dataclass(frozen=True)
class Benchmark:
    name: str
    items: list[Problem]
    samples: int
    """Default samples per item."""
    prompt: PromptFormat = field(default_factory=PromptFormat)
    """What stands around a question whose item has no turns of its own yet."""
    pass_k: int = 4
    """Default k of pass@k."""
    grader: str = "math"
    """The reward that judges its answers."""
    data: DataTable | None = None
    """Of a set of one's own: how it is read and judged."""

    def messages(self, item: Problem) -> tuple[Turn, ...]:
        """The chat turns that ask an item."""
        return item.messages or self.prompt.messages(item.question, item.row)


GENERATED: dict[str, Callable[[int], list[Problem]]] = {
    "arithmetic-heldout": arithmetic.held_out,
    "arithmetic-steps-heldout": partial(arithmetic.held_out, levels=arithmetic.STEP_LEVELS),
    "arithmetic-sums-heldout": partial(arithmetic.held_out, levels=("add2",)),
    "arithmetic-products-heldout": partial(arithmetic.held_out, levels=arithmetic.PRODUCTS),
}
"""How the items of a set without a Hub copy are drawn, by their number."""

USUAL_FIELDS = ("problem", "question")
"""What a set of one's own may call its question, besides what the recipe says."""
COUNTED_BYTES = 64 << 20
"""The largest file whose lines are counted beforehand."""


def count_items(spec: BenchmarkSpec) -> int | None:
    """How many items there are, without loading the set; None where that is not known beforehand."""
    if spec.counts:
        return spec.counts[0]
    if spec.own is None or spec.held_out or not spec.own.source.endswith(".jsonl"):
        return None
    path = Path(spec.own.source).expanduser()
    if not path.is_file() or path.stat().st_size > COUNTED_BYTES:
        return None
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def fetch(name: str, data_dir: str | None = None, recipe: Recipe | None = None) -> str | None:
    """Make a benchmark local and check it. The path for `load`; None for a generated one. Raises UserError.

    `data_dir` is the recipe's `data.path`; `recipe` says how a set of one's own is read.
    """
    spec = get(name, recipe)
    if spec.generated:
        return None
    if spec.own is not None:
        own = datasets.fetch_set(spec.own)
        load(name, own, recipe=recipe)
        return own
    assert spec.hub is not None
    path = local(spec, data_dir) or datasets.download(spec.hub)
    items = load(name, path).items
    if not _hashed(spec, len(items)) and spec.counts:
        print(
            f"benchmark `{spec.name}`: the content hash of the {len(items)}-item set is not recorded, "
            f"its count is checked; this copy has {content_hash(items)}",
            file=sys.stderr,
        )
    return str(path.resolve())


def fetch_all(names: Iterable[str], data_dir: str | None = None, recipe: Recipe | None = None) -> dict[str, str | None]:
    """{name: path}. Raises UserError, also for two sets of the same name: their results could not be told apart."""
    names = list(names)
    for i, name in enumerate(names):
        if get(name, recipe).name in (get(other, recipe).name for other in names[:i]):
            raise UserError(
                f"two benchmarks are called `{get(name, recipe).name}`: {', '.join(names)}", "rename one's file"
            )
    return {name: fetch(name, data_dir, recipe) for name in names}


def load(
    name: str, local_path: str | Path | None = None, own_prompt: str = MATH_PROMPT, recipe: Recipe | None = None
) -> Benchmark:
    """A benchmark from `local_path`, from its own path or ASTRA_DATA_DIR, or generated.

    With `recipe`, a set of one's own is read and judged as its data table says. A known set is asked with its own
    prompt, after the recipe's system turn; one without a prompt with `own_prompt`, or the recipe's template and
    examples.

    Raises UserError, also for a wrong number of items and for other content than the hash says.
    """
    spec = get(name, recipe)
    if spec.own is not None:
        table = spec.own
        loaded = datasets.load(table, local_path, *(["held_out"] if spec.held_out else ["train", USUAL_FIELDS]))
        table = table if recipe is not None else table.by("math")
        prompt, grader = PromptFormat.of(table), table.grader
        return Benchmark(spec.name, list(loaded), spec.samples, prompt, grader=grader, data=table)
    prompt = PromptFormat.of(recipe.data) if recipe is not None else PromptFormat(own_prompt)
    if spec.prompt:
        prompt = PromptFormat(spec.prompt, prompt.system)
    if spec.hub is None:
        return Benchmark(name, GENERATED[name](spec.counts[0]), spec.samples, prompt, grader="number")
    path = Path(local_path) if local_path is not None else local(spec)
    if path is None:
        raise UserError(
            f"benchmark `{name}` is not on this machine",
            f"put {name}.jsonl into a directory and name that in data.path or {datasets.DATA_DIR_VARIABLE}, "
            f"or fetch `{spec.hub.hub_id}`",
        )
    loaded = datasets.Problems(
        path,
        split=spec.hub.split,
        question_fields=tuple(dict.fromkeys(["problem", *spec.hub.question_fields])),
        answer_fields=tuple(dict.fromkeys(["answer", *spec.hub.answer_fields])),
        final_after=spec.hub.final_after,
        prompt=prompt,
    )
    _check(spec, path, loaded)
    return Benchmark(spec.name, list(loaded), spec.samples, prompt)


def _check(spec: BenchmarkSpec, path: Path, loaded: datasets.Problems) -> None:
    """Raises UserError with both figures when a set has another size or says something else than it should."""
    found = len(loaded)
    origin = spec.hub.hub_id if spec.hub else ""
    if spec.counts and found not in spec.counts:
        repeated = f", {loaded.duplicates} of them repeated" if loaded.duplicates else ""
        raise UserError(
            f"benchmark `{spec.name}` has {' or '.join(map(str, spec.counts))} items, `{path}` holds {found}{repeated}",
            f"use an unchanged copy of `{origin}`, or name the file itself as a benchmark of your own",
        )
    if not _hashed(spec, found):
        return
    hashed = content_hash(loaded)
    if hashed not in spec.hashes:
        raise UserError(
            f"benchmark `{spec.name}` has the content hash {' or '.join(spec.hashes)}, `{path}` has {hashed}: "
            "its problems or answers are not the same",
            f"use an unchanged copy of `{origin}`, or name the file itself as a benchmark of your own: "
            f"`--benchmark {path}`",
        )


def _hashed(spec: BenchmarkSpec, items: int) -> bool:
    """Whether it is known what a copy with so many items must hash to."""
    return bool(spec.hashes) and items == spec.counts[0]


def local(spec: BenchmarkSpec, data_dir: str | None = None) -> Path | None:
    """Where a copy of a benchmark lies in `data_dir`, else in ASTRA_DATA_DIR; None when there is none."""
    places = (datasets.find_in_data_dir(name, "eval", data_dir) for name in (spec.name, *spec.file_names))
    return next((place for place in places if place is not None), None)
