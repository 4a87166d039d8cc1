"""Benchmarks and training sets in a data directory with `eval/` and `train/`: `bench/grading/benchmarks.py DIR`.

Loads every known benchmark from DIR and prints its items, content hash and licence, or why it was not run; then counts
the problems of every training set that are also benchmark items (10-grams, 60 %). With DIR/train/CONTAMINATED_IDS.json,
another's list of such problems ({file: {id: ...}}), it prints how many of those are found too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from astracli.config.benchmarks import BENCHMARKS
from astracli.data import benchmarks, datasets, decontamination
from astracli.data.content_hash import content_hash
from astracli.data.prompts import Problem
from astracli.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, show


def load_all() -> tuple[dict[str, list[Problem]], list[dict[str, Any]]]:
    """Every written benchmark that is there, and a row of each."""
    rows, found = [], {}
    for name, spec in BENCHMARKS.items():
        if spec.hub is None:
            continue
        row: dict[str, Any] = {"benchmark": name, "samples": spec.samples, "licence": spec.licence}
        try:
            items = found[name] = benchmarks.load(name).items
            rows.append(row | {"items": len(items), "content_hash": content_hash(items)})
        except UserError as error:
            rows.append(row | {"not_run": error.message})
    return found, rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    os.environ[datasets.DATA_DIR_VARIABLE] = str(args.folder)
    items, loaded = load_all()
    listed = args.folder / "train" / "CONTAMINATED_IDS.json"
    known = json.loads(listed.read_text()) if listed.exists() else {}
    rows = []
    for file in sorted((args.folder / "train").glob("*.jsonl")):
        fields = {"question_fields": ("problem", "question"), "answer_fields": ("answer",)}
        problems = datasets.Problems(file, split="train", **fields)
        began = time.monotonic()
        found = decontamination.find(problems, items)
        seconds = time.monotonic() - began
        theirs = set(known.get(file.name, {}))
        both = len(theirs & {overlap.problem_id for overlap in found})
        equal = sum(overlap.kind == "equal" for overlap in found)
        row = {"training set": file.stem, "problems": len(problems), "equal": equal, "near": len(found) - equal}
        rows.append(row | {"listed by others": len(theirs), "found of these": both, "seconds": seconds})
    show(args, {"benchmarks": loaded, "training sets": rows})


if __name__ == "__main__":
    main()
