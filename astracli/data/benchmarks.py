"""The benchmarks by name: where each lies, how its items read, how many there are and how often each is sampled.

The number of items is part of a benchmark's identity: a set that is cut, doubled or mixed up is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from astracli.data import arithmetic, datasets
from astracli.data.datasets import HubSet
from astracli.data.prompts import MATH_PROMPT, Problem, render
from astracli.errors import UserError


@dataclass(frozen=True)
class BenchmarkSpec:
    """What is known of a benchmark before it is loaded."""

    name: str
    counts: tuple[int, ...]
    """Accepted numbers of items: one, or one per copy in circulation."""
    samples: int
    """Samples per item, unless the recipe says otherwise."""
    hub: HubSet | None
    """None: generated."""
    prompt: str = MATH_PROMPT
    licence: str = ""
    file_names: tuple[str, ...] = ()
    """Names of a local copy besides the benchmark's own."""


@dataclass(frozen=True)
class Benchmark:
    name: str
    items: list[Problem]
    samples: int
    """Default samples per item."""
    prompt: str
    pass_k: int = 4
    """Default k of pass@k."""

    def text(self, item: Problem) -> str:
        """What the user turn says for an item."""
        return render(self.prompt, item.question)


_SPECS = (
    BenchmarkSpec("arithmetic-heldout", (256,), 8, None, "{question}", "generated"),
    BenchmarkSpec("aime24", (30,), 16, HubSet("HuggingFaceH4/aime_2024", "train"), licence="MAA"),
    BenchmarkSpec("aime25", (30,), 16, HubSet("math-ai/aime25", "test"), licence="MAA"),
    BenchmarkSpec("amc", (45,), 16, HubSet("rawsh/2024_AMC12", "train"), licence="MAA"),
    BenchmarkSpec("amc23", (40,), 16, HubSet("math-ai/amc23", "test"), licence="MAA"),
    BenchmarkSpec("amc22_23", (83,), 16, HubSet("AI-MO/aimo-validation-amc", "train"), licence="MAA"),
    BenchmarkSpec("minerva", (272,), 4, HubSet("math-ai/minervamath", "test"), licence="MIT"),
    BenchmarkSpec("math500", (500,), 4, HubSet("HuggingFaceH4/MATH-500", "test"), licence="MIT"),
    BenchmarkSpec(
        "gsm8k",
        (1319,),
        4,
        HubSet("openai/gsm8k", "test", config="main", final_after="####"),
        licence="MIT",
        file_names=("gsm8k_test",),
    ),
    BenchmarkSpec(
        "olympiadbench",
        (675, 674),
        4,
        HubSet("math-ai/olympiadbench", "test", answer_fields=("answer", "final_answer")),
        licence="MIT",
    ),
)
BENCHMARKS: dict[str, BenchmarkSpec] = {spec.name: spec for spec in _SPECS}


def get(name: str) -> BenchmarkSpec:
    """A benchmark by name. Raises UserError with the nearest name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else "choose from the list"
    raise UserError(f"there is no benchmark `{name}`: {', '.join(BENCHMARKS)}", hint)


def fetch(name: str) -> str | None:
    """Make a benchmark local and check it. The path for `load`; None for a generated one. Raises UserError."""
    spec = get(name)
    if spec.hub is None:
        return None
    path = local(spec) or datasets.download(spec.hub)
    load(name, path)
    return str(path)


def fetch_all(names: Iterable[str]) -> dict[str, str | None]:
    return {name: fetch(name) for name in names}


def load(name: str, local_path: str | Path | None = None) -> Benchmark:
    """A benchmark from `local_path`, from ASTRA_DATA_DIR, or generated. Raises UserError, also for a wrong count."""
    spec = get(name)
    if spec.hub is None:
        return Benchmark(name, arithmetic.held_out(spec.counts[0]), spec.samples, spec.prompt)
    path = Path(local_path) if local_path is not None else local(spec)
    if path is None:
        raise UserError(
            f"benchmark `{name}` is not on this machine",
            f"put {name}.jsonl into a directory and set {datasets.DATA_DIR_VARIABLE}, or fetch `{spec.hub.hub_id}`",
        )
    loaded = datasets.read_problems(
        path,
        split=spec.hub.split,
        question_fields=tuple(dict.fromkeys(["problem", *spec.hub.question_fields])),
        answer_fields=tuple(dict.fromkeys(["answer", *spec.hub.answer_fields])),
        final_after=spec.hub.final_after,
    )
    found = len(loaded.problems)
    if found not in spec.counts:
        repeated = f", {loaded.duplicates} of them repeated" if loaded.duplicates else ""
        raise UserError(
            f"benchmark `{name}` has {' or '.join(map(str, spec.counts))} items, `{path}` holds {found}{repeated}",
            f"use an unchanged copy of `{spec.hub.hub_id}` ({spec.hub.split})",
        )
    return Benchmark(name, loaded.problems, spec.samples, spec.prompt)


def local(spec: BenchmarkSpec) -> Path | None:
    """Where a copy of a benchmark lies in ASTRA_DATA_DIR; None when there is none."""
    places = (datasets.find_in_data_dir(name, "eval") for name in (spec.name, *spec.file_names))
    return next((place for place in places if place is not None), None)
