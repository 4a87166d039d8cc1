"""Do evaluations hold up a run? One real `astra train` on this CPU, against what its engines and its trainer could do.

    python bench/eval_run.py [--engines 4] [--ranks 4] [--steps 16] [--every 2] [--samples 48] [--set KEY=VALUE]

The shipped tiny recipe. Wall time counts from when all processes are ready until the last evaluation is done. It is
compared with the larger of what the trainer worked (its steps without waiting) and what the engines needed for all
tokens of rollouts and evaluations at their rate: tokens over the seconds in which an engine decoded, each engine's
added up, as the engines themselves tell it. 1.00 means that one of both was never idle. Every evaluation must be there:
its own step, or a later one that stands for it. Prints what was seen, and exits 1 when an evaluation is missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from killing import Attempt, records

EVERY_S = 0.5


def ask_engines(run: Path) -> dict[str, dict[str, float]]:
    """Engine -> its tokens so far and the seconds in which it prefilled or decoded; without those that are silent."""
    found = {}
    try:
        config = json.loads((run / "config" / "eval.json").read_text())
    except (OSError, ValueError):
        return {}
    for engine in config["engines"]:
        request = urllib.request.Request(
            engine["url"] + "/model_info", headers={"Authorization": f"Bearer {config['token']}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5.0) as reply:
                told = json.loads(reply.read())
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
        "wall_s": wall_s,
        "training_s": training_s,
        "generation_s": generation_s,
        "ratio": wall_s / max(training_s, generation_s),
        "tokens": tokens,
        "evaluation_tokens": evaluation_tokens,
        "engines_tokens_per_s": rate,
        "engines_busy": sum(engine["busy_s"] for engine in engines.values()) / len(engines) / wall_s,
        "trainer_waited": summary["training"]["wait_share"],
        "evaluations": rows,
        "missing": missing,
        "limit": summary["bottleneck"]["limit"],
        "verdict": summary["bottleneck"]["words"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("engines", 4), ("ranks", 4), ("steps", 16), ("every", 2), ("samples", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--set", action="append", default=[], help="another setting of the recipe")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--limit-s", type=float, default=3600.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sets = [
        f"resources.engines={args.engines}",
        f"resources.train_ranks={args.ranks}",
        f"train.steps={args.steps}",
        f"eval.every={args.every}",
        f"eval.samples={args.samples}",
        "checkpoint.every=0",
        *args.set,
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = (args.run_dir or Path(folder) / "run").resolve()
        run.parent.mkdir(parents=True, exist_ok=True)
        found = figures(run, watch(run, sets, args.limit_s), args.steps, args.every)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    sys.exit(1 if found["missing"] else 0)


if __name__ == "__main__":
    main()
