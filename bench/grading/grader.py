"""Our grader and plain math-verify beside the verdicts of others, by source: `bench/grading/grader.py DIR [--show 20]`.

Without DIR it prints the speed on short integer answers alone, which stands beside the rest with DIR too.

DIR holds .jsonl files of {"gold", "output", "correct", "source"}: a model's output and what a person or another grader
said of it. Plain math-verify is `verify(parse("\\boxed{GOLD}"), parse(OUTPUT))` with its defaults. Disagreements are
said on stderr (`gold refused`: the output says the gold letter by letter, and the published verdict is `wrong`); a
convention of the other grader (x100 accepted, say) is no fault of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from astracli.rewards.reward import GradeItem, GradePool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import options, show

PYTHONPATH = os.environ.get("PYTHONPATH")
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
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), PYTHONPATH]))
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


def errors(args: argparse.Namespace) -> dict[str, Any]:
    """Wrong answers called right and right answers refused, by kind, on labelled pairs."""
    rows = [json.loads(line) for line in args.pairs.open(encoding="utf-8") if line.strip()]
    rows = [row | {"output": row["completion"], "correct": row["right"]} for row in rows]
    found = {who: verdicts(rows, spec, args.workers)[0] for who, spec in (("", "math"), ("math-verify ", PLAIN))}
    lines = []
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        chosen = [i for i, row in enumerate(rows) if kind in (row["kind"], "all")]
        wrong = {
            who + what: sum((said[i] == "right") != rows[i]["correct"] and rows[i]["correct"] == label for i in chosen)
            for who, said in found.items()
            for what, label in (("called right", False), ("refused", True))
        }
        lines.append({"kind": kind, "pairs": len(chosen), **wrong})
    return {"pairs": lines}


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


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rows = read(args.folder)
    ours, rate = verdicts(rows, "math", args.workers)
    theirs, plain_rate = verdicts(rows, PLAIN, args.workers)
    lines = []
    for key in ("file", "source"):
        a, b = agreement(rows, ours, key), agreement(rows, theirs, key)
        for name, (right, total) in a.items():
            line = {key: name, "rows": total, "ours": right / total, "math-verify": b[name][0] / total}
            refused = sum(row[key] == name and not row["correct"] and says_the_gold(row) for row in rows)
            lines.append(line | {"below": right < b[name][0], "gold refused": refused})
    shown: dict[str, int] = {}
    for row, verdict, other in zip(rows, ours, theirs, strict=True):
        shown[row["file"]] = shown.get(row["file"], 0)
        if (verdict == "right") == row["correct"] or shown[row["file"]] >= args.show:
            continue
        shown[row["file"]] += 1
        said = "right" if row["correct"] else "wrong"
        print(f"\n{row['source']}: they say {said}, we say {verdict}, math-verify {other}", file=sys.stderr)
        print(f"  gold: {row['gold']!r}\n  end of output: {row['output'][-160:]!r}", file=sys.stderr)
    if args.verdicts:
        args.verdicts.write_text(json.dumps([[r["id"], o, p] for r, o, p in zip(rows, ours, theirs, strict=True)]))
    return {"per_s": rate, "math_verify_per_s": plain_rate, "agreement": lines}


def main() -> None:
    parser = options(
        __doc__, show={20: "disagreements a file"}, workers=1, verdicts={Path: "write every verdict there"},
        pairs={Path: "labelled pairs, as tests/fixtures/grading_pairs.jsonl, instead of DIR"},
    )  # fmt: skip
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    found: dict[str, Any] = errors(args) if args.pairs else {}
    found |= compare(args) if args.folder else {}
    found |= {"short_answers_per_s": short_answers(args.workers), "workers": args.workers}
    show(args, found)


if __name__ == "__main__":
    main()
