"""A whole evaluation of the shipped model: `python bench/evaluation/whole.py [--items 1000] [--samples 8] [--json]`.

`astra eval` as a user runs it, on that many generated problems: once, once more, and over two engines. Prints the
wall time of each command, from import to results, and whether all files below `eval/` are the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from astracli.cli.output import table_lines
from astracli.data import arithmetic

RECIPE = "qwen3.5-tiny-m2po-delta"
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
    command = [sys.executable, "-m", "astracli", "eval", RECIPE, "--benchmark", str(folder / "generated.jsonl")]
    command += ["--samples", str(samples), "--set", f"resources.engines={engines}", "--out", str(out), "--json"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    wall_s = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout)["results"]["generated"]
    return {
        "run": name,
        "items": found["items"],
        "samples": found["n"],
        "avg_at_n": found["avg_at_n"],
        "stderr": found["stderr"],
        "wall_s": wall_s,
        "files": digest(out / "eval"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_items(Path(name) / "generated.jsonl", args.items)
        rows = [evaluate(Path(name), run, engines, args.samples) for run, engines in RUNS]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        cells = [
            [r["run"], r["items"], r["samples"], r["avg_at_n"], r["stderr"], r["wall_s"], r["files"]] for r in rows
        ]
        heads = ["run", "items", "samples", "avg@n", "stderr", "wall s", "digest of all files"]
        print("\n".join(table_lines(heads, cells)))
    sys.exit(0 if len({row["files"] for row in rows}) == 1 else 1)


if __name__ == "__main__":
    main()
