"""Evaluations of the shipped model in real processes on this CPU: alone, and beside training.

    python bench/evaluation/run.py alone [--items 1000] [--samples 8]
    python bench/evaluation/run.py beside [--engines 4] [--ranks 4] [--steps 16] [--every 2] [--set KEY=VALUE]

`alone`: `astra eval` as a user runs it, on that many generated problems: once, once more, and over two engines. Prints
the wall time of each command, from import to results, and whether all files below `eval/` are the same bytes.

`beside`: do evaluations hold up a run? One `astra train` against what its engines and its trainer could do. Wall time
counts from when all processes are ready until the last evaluation is done. It is compared with the larger of what the
trainer worked (its steps without waiting) and what the engines needed for all tokens of rollouts and evaluations at
their rate: tokens over the seconds in which an engine decoded, each engine's added up, as the engines themselves tell
it. 1.00 means that one of both was never idle. Every evaluation must be there: its own step, or a later one that stands
for it. Exits 1 when an evaluation is missing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from astracli.data import arithmetic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.kill_resume import Attempt
from shared import ASTRA, RECIPE, ask, finished, folder, more_options, records, show

LEVELS = ["add2", "sub2", "add3", "sub3"]
RUNS = (("one engine", 1), ("the same again", 1), ("two engines", 2))
EVERY_S = 0.5


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


def ask_engines(run: Path) -> dict[str, dict[str, float]]:
    """Engine -> its tokens so far and the seconds in which it prefilled or decoded; without those that are silent."""
    found = {}
    try:
        config = json.loads((run / "config" / "eval.json").read_text())
    except (OSError, ValueError):
        return {}
    for engine in config["engines"]:
        try:
            told = ask(engine["url"], config["token"])
        except (OSError, ValueError):
            continue
        if "tokens_generated" in told:
            busy_s = told["seconds"]["prefill"] + told["seconds"]["decode"]
            found[engine["name"]] = {"tokens": told["tokens_generated"], "busy_s": busy_s}
    return found


def watch(run: Path, sets: list[str], limit_s: float) -> dict[str, dict[str, float]]:
    """The run to its end. -> the last that each engine told."""
    attempt = Attempt(run, sets, resume=False)
    engines: dict[str, dict[str, float]] = {}
    while attempt.supervisor.poll() is None and attempt.seconds < limit_s:
        engines |= ask_engines(run)
        time.sleep(EVERY_S)
    code, console = attempt.end(30)
    if code:
        sys.exit(f"the run ended with {code}:\n{console[-3000:]}")
    return engines


def evaluated(run: Path, steps: int, every: int) -> tuple[list[tuple[int, int]], list[int]]:
    """([(step, due step)] in order, the due steps that no evaluation stands for)"""
    with (run / "eval" / "eval.csv").open(newline="") as file:
        rows = sorted({(int(row["step"]), int(row["due_step"])) for row in csv.DictReader(file)})
    due = [*range(0, steps, every), steps]
    return rows, [one for one in due if not any(first <= one <= step for step, first in rows)]


def figures(run: Path, engines: dict[str, dict[str, float]], steps: int, every: int) -> dict[str, Any]:
    """What came of a run, by `engines` as `watch` returns them."""
    found = records(run)
    summary = json.loads((run / "summary.json").read_text())
    trainer = [r for r in found if r["process"] == "trainer" and "step_s" in r]
    evaluation_tokens = sum(r["eval_tokens"] for r in found if "eval_wall_s" in r)
    tokens = sum(engine["tokens"] for engine in engines.values())
    rate = sum(engine["tokens"] / engine["busy_s"] for engine in engines.values())
    phases = summary["phases_s"]
    wall_s = phases["training"] + phases["last evaluations"]
    training_s = sum(r["step_s"] - r["wait_s"] for r in trainer)
    generation_s = tokens / rate
    rows, missing = evaluated(run, steps, every)
    return {
        "wall_s": wall_s, "training_s": training_s, "generation_s": generation_s,
        "ratio": wall_s / max(training_s, generation_s), "tokens": tokens, "evaluation_tokens": evaluation_tokens,
        "engines_tokens_per_s": rate,
        "engines_busy": sum(engine["busy_s"] for engine in engines.values()) / len(engines) / wall_s,
        "trainer_waited": summary["training"]["wait_share"], "evaluations": rows, "missing": missing,
        "limit": summary["bottleneck"]["limit"], "verdict": summary["bottleneck"]["words"],
    }  # fmt: skip


def alone(args: argparse.Namespace, name: Path) -> tuple[dict[str, Any], bool]:
    """(what was found, whether it is as it must be)"""
    write_items(name / "generated.jsonl", args.items)
    rows = [evaluate(name, run, engines, args.samples) for run, engines in RUNS]
    return {"rows": rows}, len({row["files"] for row in rows}) == 1


def beside(args: argparse.Namespace, name: Path) -> tuple[dict[str, Any], bool]:
    """(what was found, whether it is as it must be)"""
    sets = [f"resources.engines={args.engines}", f"resources.train_ranks={args.ranks}", f"train.steps={args.steps}"]
    sets += [f"eval.every={args.every}", f"eval.samples={args.samples}", "checkpoint.every=0", *args.set]
    run = (args.run_dir or name / "run").resolve()
    run.parent.mkdir(parents=True, exist_ok=True)
    found = figures(run, watch(run, sets, args.limit_s), args.steps, args.every)
    return found, not found["missing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    more_options(commands.add_parser("alone"), json=False, items=1000, samples=8)
    more_options(
        commands.add_parser("beside"), json=False, engines=4, ranks=4, steps=16, every=2, samples=48, run_dir=Path,
        set="another setting of the recipe", limit_s=3600.0,
    )  # fmt: skip
    args = parser.parse_args()
    with folder() as name:
        found, good = (alone if args.what == "alone" else beside)(args, name)
    show(args, found)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
