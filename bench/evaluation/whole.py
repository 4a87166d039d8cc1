"""A whole evaluation of the shipped model: `python bench/evaluation/whole.py [--items 1000] [--samples 8] [--json]`.

`astra eval` as a user runs it, on that many generated problems: once, once more, and over two engines. Prints the
wall time of each command, from import to results, and whether all files below `eval/` are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from astracli.data import arithmetic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ASTRA, RECIPE, finished, folder, options, show

LEVELS = ["add2", "sub2", "add3", "sub3"]
RUNS = (("one engine", 1), ("the same again", 1), ("two engines", 2))


def write_items(path: Path, count: int) -> None:
    """So many different generated problems, the same ones every time."""
    found: dict[str, str] = {}
    place = 0
    while len(found) < count:
        problem = arithmetic.draw(place, 2026, LEVELS)
        found[problem.question] = problem.answer
        place += 1
    path.write_text("".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in found.items()))


def digest(folder: Path) -> str:
    """Of every file below a folder, names included."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def evaluate(folder: Path, name: str, engines: int, samples: int) -> dict[str, Any]:
    out = folder / name.replace(" ", "-")
    words = [*ASTRA, "eval", RECIPE, "--benchmark", str(folder / "generated.jsonl"), "--samples", str(samples)]
    words += ["--set", f"resources.engines={engines}", "--out", str(out), "--json"]
    wall_s, said = finished(words, folder)
    found = json.loads(said)["results"]["generated"]
    return {
        "run": name, "items": found["items"], "samples": found["n"], "avg_at_n": found["avg_at_n"],
        "stderr": found["stderr"], "wall_s": wall_s, "files": digest(out / "eval"),
    }  # fmt: skip


def main() -> None:
    args = options(__doc__, items=1000, samples=8).parse_args()
    with folder() as name:
        write_items(name / "generated.jsonl", args.items)
        rows = [evaluate(name, run, engines, args.samples) for run, engines in RUNS]
    show(args, {"rows": rows})
    sys.exit(0 if len({row["files"] for row in rows}) == 1 else 1)


if __name__ == "__main__":
    main()
