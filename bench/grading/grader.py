"""Our grader and plain math-verify beside the verdicts of others, by source: `bench/grading/grader.py DIR [--show 20]`.

Without DIR it prints the speed on short integer answers alone, which stands in the last line with DIR too.

DIR holds .jsonl files of {"gold", "output", "correct", "source"}: a model's output and what a person or another grader
said of it. Plain math-verify is `verify(parse("\\boxed{GOLD}"), parse(OUTPUT))` with its defaults. Disagreements are
printed under the table; a convention of the other grader (x100 accepted, say) is no fault of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

from astracli.cli.output import table_lines
from astracli.rewards.reward import GradeItem, GradePool

PYTHONPATH = os.environ.get("PYTHONPATH")
BENCH = str(Path(__file__).resolve().parents[1])
PLAIN = "grading.grader:plain"
"""The function below, for the processes that grade."""


def plain(problem: str, answer: str, completion: str) -> float:
    """math-verify alone, as a reward (it runs in the same killable processes)."""
    from astracli.rewards.grading.algebra import load_math_verify

    parse, verify = load_math_verify()
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def read(folder: Path) -> list[dict]:
    """The pairs of every file, each with `file`. Exits when there are none."""
    rows = [
        json.loads(line) | {"file": file.stem}
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.open(encoding="utf-8")
        if line.strip()
    ]
    if not rows:
        sys.exit(f"no .jsonl pairs in `{folder}`")
    return rows


def verdicts(rows: list[dict], spec: str, workers: int) -> tuple[list[str], float]:
    """Verdicts and gradings a second."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [BENCH, PYTHONPATH]))
    items = [GradeItem(row.get("problem") or "", row["gold"], row["output"]) for row in rows]
    with GradePool(spec, workers, 10.0) as pool:
        pool.grade([GradeItem("", "x+1", "\\boxed{1+x}")])  # start and import outside the clock
        began = time.monotonic()
        found = [grade.verdict for grade in pool.grade(items)]
        return found, len(items) / (time.monotonic() - began)


def short_answers(workers: int, count: int = 20_000) -> float:
    """Gradings a second of answers as the tiny model gives them, a third of them wrong."""
    rows = [{"gold": str(i), "output": f"12 08 \\boxed{{{i + (i % 3 == 0)}}}"} for i in range(count)]
    found, rate = verdicts(rows, "math", workers)
    assert found.count("right") == count - len(range(0, count, 3))
    return rate


def errors(args: argparse.Namespace) -> None:
    """Wrong answers called right and right answers refused, by kind, on labelled pairs."""
    rows = [json.loads(line) for line in args.pairs.open(encoding="utf-8") if line.strip()]
    rows = [row | {"output": row["completion"], "correct": row["right"]} for row in rows]
    found = [verdicts(rows, spec, args.workers)[0] for spec in ("math", PLAIN)]
    lines = []
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        chosen = [i for i, row in enumerate(rows) if kind in (row["kind"], "all")]
        wrong = [
            sum((said[i] == "right") != rows[i]["correct"] and rows[i]["correct"] == label for i in chosen)
            for said in found
            for label in (False, True)
        ]
        lines.append([kind, len(chosen), *wrong])
    columns = ["kind", "pairs", "called right", "refused", "math-verify: called right", "refused"]
    print("\n".join(table_lines(columns, lines, 140)))


def says_the_gold(row: dict) -> bool:
    """Whether the last box, or the `final answer is ...`, is the gold letter by letter, fonts and spaces aside."""
    ends = [row["output"].rfind("\\boxed{"), row["output"].lower().rfind("final answer is")]
    end = row["output"][max(ends) :].split("{" if ends[0] > ends[1] else "is", 1)[-1] if max(ends) >= 0 else ""
    end, gold = (re.sub(r"\\text|[{}$\\\s\"]", "", text) for text in (end, row["gold"]))
    return bool(gold) and re.match(re.escape(gold) + r"(?!\.?\d|[\w^/+*-])", end) is not None


def agreement(rows: list[dict], found: list[str], key: str) -> dict[str, tuple[int, int]]:
    """{source: (agreeing, rows)}"""
    counts: dict[str, tuple[int, int]] = {}
    for row, verdict in zip(rows, found, strict=True):
        right, total = counts.get(row[key], (0, 0))
        counts[row[key]] = right + ((verdict == "right") == row["correct"]), total + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--show", type=int, default=20, help="disagreements a file (default 20)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every verdict there")
    parser.add_argument("--pairs", type=Path, help="labelled pairs, as tests/fixtures/grading_pairs.jsonl")
    args = parser.parse_args()
    if args.pairs is not None:
        errors(args)
    if args.folder is not None:
        compare(args)
    print(f"{short_answers(args.workers):.0f} gradings/s of short integer answers, {args.workers} worker(s)")


def compare(args: argparse.Namespace) -> None:
    rows = read(args.folder)
    ours, rate = verdicts(rows, "math", args.workers)
    theirs, plain_rate = verdicts(rows, PLAIN, args.workers)
    lines = []
    for key in ("file", "source"):
        a, b = agreement(rows, ours, key), agreement(rows, theirs, key)
        for name, (right, total) in a.items():
            mark = "" if right >= b[name][0] else "below"
            refused = sum(row[key] == name and not row["correct"] and says_the_gold(row) for row in rows)
            lines.append([name, total, f"{right / total:.4f}", f"{b[name][0] / total:.4f}", mark, refused or ""])
    columns = ["file, then source", "rows", "ours", "math-verify", "", "gold refused"]
    print("\n".join(table_lines(columns, lines, 140)))
    print("\ngold refused: the output says the gold letter by letter, and the published verdict is `wrong`")
    print(f"\n{rate:.0f} gradings/s here, {plain_rate:.0f} by math-verify alone, {args.workers} worker(s)")
    shown: dict[str, int] = {}
    for row, verdict, other in zip(rows, ours, theirs, strict=True):
        shown[row["file"]] = shown.get(row["file"], 0)
        if (verdict == "right") == row["correct"] or shown[row["file"]] >= args.show:
            continue
        shown[row["file"]] += 1
        said = "right" if row["correct"] else "wrong"
        print(f"\n{row['source']}: they say {said}, we say {verdict}, math-verify {other}")
        print(f"  gold: {row['gold']!r}\n  end of output: {row['output'][-160:]!r}")
    if args.json:
        args.json.write_text(json.dumps([[row["id"], o, p] for row, o, p in zip(rows, ours, theirs, strict=True)]))


if __name__ == "__main__":
    main()
