"""Benchmarks and training sets in a data directory with `eval/` and `train/`: `bench/grading/benchmarks.py DIR`.

Loads every known benchmark from DIR and prints its items, content hash and licence, or why it was not run; then counts
the problems of every training set that are also benchmark items (10-grams, 60 %). With DIR/train/CONTAMINATED_IDS.json,
another's list of such problems ({file: {id: ...}}), it prints how many of those are found too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from astracli.cli.output import table_lines
from astracli.config.benchmarks import BENCHMARKS
from astracli.data import benchmarks, datasets, decontamination
from astracli.data.content_hash import content_hash
from astracli.data.prompts import Problem
from astracli.errors import UserError


def load_all() -> dict[str, list[Problem]]:
    """Every written benchmark that is there; prints one row each."""
    rows, found = [], {}
    for name, spec in BENCHMARKS.items():
        if spec.hub is None:
            continue
        try:
            items = found[name] = benchmarks.load(name).items
            rows.append([name, len(items), content_hash(items), spec.samples, spec.licence])
        except UserError as error:
            rows.append([name, "not run", "-", spec.samples, error.message])
    print("\n".join(table_lines(["benchmark", "items", "content hash", "samples", "licence"], rows, 150)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    os.environ[datasets.DATA_DIR_VARIABLE] = str(args.folder)
    items = load_all()
    listed = args.folder / "train" / "CONTAMINATED_IDS.json"
    known = json.loads(listed.read_text()) if listed.exists() else {}
    rows = []
    for file in sorted((args.folder / "train").glob("*.jsonl")):
        problems = datasets.Problems(
            file, split="train", question_fields=("problem", "question"), answer_fields=("answer",)
        )
        began = time.monotonic()
        found = decontamination.find(problems, items)
        seconds = time.monotonic() - began
        theirs = set(known.get(file.name, {}))
        both = theirs & {overlap.problem_id for overlap in found}
        equal = sum(overlap.kind == "equal" for overlap in found)
        rows.append([file.stem, len(problems), equal, len(found) - equal, len(theirs), len(both), seconds])
    print()
    heads = ["training set", "problems", "equal", "near", "listed by others", "found of these", "seconds"]
    print("\n".join(table_lines(heads, rows, 120)))


if __name__ == "__main__":
    main()
