"""The benchmarks by name: where each lies, how its items read, how many there are and how often each is sampled.

The number of items and the content hash are a benchmark's identity: a set that is cut, doubled or changed is refused. A
set of one's own goes by its path (`--benchmark my_set.jsonl`) and is taken as it is. Where no hash is recorded
(`amc`, and OlympiadBench's copy of 674 items) the count alone is checked, and `fetch` says so.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from astracli.data import arithmetic, datasets
from astracli.data.content_hash import content_hash
from astracli.data.datasets import HubSet
from astracli.data.prompts import MATH_PROMPT, Problem, render
from astracli.errors import UserError


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
    """Empty: the recipe's `data.prompt`."""
    licence: str = ""
    file_names: tuple[str, ...] = ()
    """Names of a local copy besides the benchmark's own."""
    hashes: tuple[str, ...] = ()
    """Accepted `content_hash`es of a copy with the first of `counts`; () when nobody could load the set yet: then the
    number of items alone is checked, and that is said."""
    hub_loaded: bool = False
    """Whether the Hub copy was ever loaded and found to have that hash; until then it is marked `not run`."""
    path: Path | None = None
    """The file of a set of one's own."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    items: list[Problem]
    samples: int
    """Default samples per item."""
    prompt: str
    pass_k: int = 4
    """Default k of pass@k."""
    grader: str = "math"
    """The reward that judges its answers."""

    def text(self, item: Problem) -> str:
        """What the user turn says for an item."""
        return render(self.prompt, item.question)


GENERATED: dict[str, Callable[[int], list[Problem]]] = {
    "arithmetic-heldout": arithmetic.held_out,
    "arithmetic-steps-heldout": arithmetic.held_out_steps,
    "arithmetic-sums-heldout": arithmetic.held_out_sums,
}
"""How the items of a set without a Hub copy are drawn, by their number."""

_MAA = "problems (c) Mathematical Association of America, collection "
_SPECS = (
    BenchmarkSpec("arithmetic-heldout", (256,), 8, None, "{question}", "generated"),
    BenchmarkSpec("arithmetic-steps-heldout", (256,), 4, None, "{question}", "generated"),
    BenchmarkSpec("arithmetic-sums-heldout", (96,), 8, None, "", "generated"),
    BenchmarkSpec(
        "aime24",
        (30,),
        16,
        HubSet("HuggingFaceH4/aime_2024", "train"),
        licence=f"{_MAA}MIT",
        hashes=("50c69a59aea22c18",),
    ),
    BenchmarkSpec(
        "aime25",
        (30,),
        16,
        HubSet("math-ai/aime25", "test"),
        licence=f"{_MAA}Apache-2.0",
        hashes=("fff8428f4392271c",),
    ),
    BenchmarkSpec("amc", (45,), 16, HubSet("rawsh/2024_AMC12", "train"), licence=f"{_MAA}without a stated licence"),
    BenchmarkSpec(
        "amc23", (40,), 16, HubSet("math-ai/amc23", "test"), licence=f"{_MAA}MIT", hashes=("16bb92275825d6f5",)
    ),
    BenchmarkSpec(
        "amc22_23",
        (83,),
        16,
        HubSet("AI-MO/aimo-validation-amc", "train"),
        licence=f"{_MAA}MIT",
        hashes=("54f5b7f5a7402846",),
    ),
    BenchmarkSpec(
        "minerva",
        (272,),
        4,
        HubSet("math-ai/minervamath", "test"),
        licence="MIT",
        hashes=("470b211dc30dd34a", "12d7ec73a5750e47"),  # the second: 62 golds rewritten in form only
    ),
    BenchmarkSpec(
        "math500",
        (500,),
        4,
        HubSet("HuggingFaceH4/MATH-500", "test"),
        licence="MIT",
        hashes=("129ab1775a34c3be",),
    ),
    BenchmarkSpec(
        "gsm8k",
        (1319,),
        4,
        HubSet("openai/gsm8k", "test", config="main", final_after="####"),
        licence="MIT",
        file_names=("gsm8k_test",),
        hashes=("583ef2eb41dca8b6",),
    ),
    BenchmarkSpec(
        "olympiadbench",
        (675, 674),
        4,
        HubSet("math-ai/olympiadbench", "test", answer_fields=("answer", "final_answer")),
        licence="MIT",
        hashes=("0e04963d599be364",),
    ),
)
COUNTED_BYTES = 64 << 20
"""The largest file whose lines are counted beforehand."""
BENCHMARKS: dict[str, BenchmarkSpec] = {spec.name: spec for spec in _SPECS}


def is_path(name: str) -> bool:
    """Whether a benchmark is named by its file: `my_set.jsonl`, `sets/mine.parquet`, `./a_datasets_directory`."""
    return "/" in name or name.endswith((".jsonl", ".parquet"))


def get(name: str) -> BenchmarkSpec:
    """A benchmark by name, or a set of one's own by path. Raises UserError with the nearest name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if is_path(name):
        path = Path(name).expanduser()
        return BenchmarkSpec(path.stem, (), 4, HubSet("", "test"), licence="your own", path=path)
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else "choose from the list"
    raise UserError(f"there is no benchmark `{name}`: {', '.join(BENCHMARKS)}", hint)


def count_items(spec: BenchmarkSpec) -> int | None:
    """How many items there are, without loading the set; None where that is not known beforehand."""
    if spec.counts:
        return spec.counts[0]
    if spec.path is None or spec.path.suffix != ".jsonl" or not spec.path.is_file():
        return None
    if spec.path.stat().st_size > COUNTED_BYTES:
        return None
    with spec.path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def fetch(name: str, data_dir: str | None = None) -> str | None:
    """Make a benchmark local and check it. The path for `load`; None for a generated one. Raises UserError.

    `data_dir` is the recipe's `data.path`.
    """
    spec = get(name)
    if spec.hub is None:
        return None
    path = spec.path or local(spec, data_dir) or datasets.download(spec.hub)
    items = load(name, path).items
    if not _hashed(spec, len(items)) and spec.counts:
        print(
            f"benchmark `{spec.name}`: the content hash of the {len(items)}-item set is not recorded, "
            f"its count is checked; this copy has {content_hash(items)}",
            file=sys.stderr,
        )
    return str(path.resolve())


def fetch_all(names: Iterable[str], data_dir: str | None = None) -> dict[str, str | None]:
    """{name: path}. Raises UserError, also for two sets of the same name: their results could not be told apart."""
    names = list(names)
    for i, name in enumerate(names):
        if get(name).name in (get(other).name for other in names[:i]):
            raise UserError(f"two benchmarks are called `{get(name).name}`: {', '.join(names)}", "rename one's file")
    return {name: fetch(name, data_dir) for name in names}


def load(name: str, local_path: str | Path | None = None, own_prompt: str = MATH_PROMPT) -> Benchmark:
    """A benchmark from `local_path`, from its own path or ASTRA_DATA_DIR, or generated.

    A set of one's own, and one whose spec has no prompt, is asked with `own_prompt`: a recipe's `data.prompt`.

    Raises UserError, also for a wrong number of items and for other content than the hash says.
    """
    spec = get(name)
    if spec.hub is None:
        items = GENERATED[name](spec.counts[0])
        return Benchmark(name, items, spec.samples, spec.prompt or own_prompt, grader="number")
    path = Path(local_path) if local_path is not None else spec.path or local(spec)
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
    )
    _check(spec, path, loaded)
    return Benchmark(spec.name, list(loaded), spec.samples, own_prompt if spec.path else spec.prompt)


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
