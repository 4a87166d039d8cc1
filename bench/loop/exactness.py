"""Deterministic mode: are the bytes the same from run to run, and after a kill -9 and a resume; and what does it cost?

    python bench/loop/exactness.py [--steps 8] [--points trainer@3 ...] [--timing-steps 20]

A point NAME@N kills process NAME once N steps are trained (0: a moment after it has started), resumes, and compares
with the run that nobody disturbed: exported weights, evaluation items, samples, eval.csv, and every figure that is no
time. The last table runs the recipe at its own size in both modes. Exits 1 when anything differs. About 20 s a point.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, options, records, say, show, trained

from loop.kill_resume import CHILDREN, Attempt

SMALL = [
    "launch.deterministic=true", "train.batch_groups=4", "train.minibatches=2", "checkpoint.every=2", "eval.every=2",
    "eval.samples=4",
]  # fmt: skip
OF_A_PROCESS = frozenset({"time", "slots_busy", "rows_max_abs", "rows_gradient_error", "rows_gradient_own_shape"})
"""Not figures of a step: a clock, a share of time, a check that each trainer process makes on its first batch."""


def digests(run: Path) -> dict[str, str]:
    """File -> hash, of everything that a deterministic run writes alike."""
    files = [
        *run.glob("export/*.safetensors"), *run.glob("eval/items/*"), *run.glob("samples/*"), run / "eval/eval.csv",
    ]  # fmt: skip
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def figures(run: Path, processes: tuple[str, ...] = ("trainer", "eval")) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(process, step, benchmark, kind) -> its figures that are no time; of a step that stands twice, the later."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records(run):
        if record["process"] in processes:
            key = (record["process"], record["step"], record.get("benchmark"), "loss" in record)
            found[key] = {
                name: value
                for name, value in record.items()
                if name not in OF_A_PROCESS and not name.endswith(("_s", "_per_s"))
            }
    return found


def difference(one: Path, two: Path, *, whole: bool) -> list[str]:
    """What differs, by name. `whole`: both were never resumed, so that the engine's updates must be alike too."""
    a, b = digests(one), digests(two)
    odd = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    who = ("trainer", "eval", "rollout") if whole else ("trainer", "eval")
    x, y = figures(one, who), figures(two, who)
    return odd + sorted(str(key) for key in x.keys() | y.keys() if x.get(key) != y.get(key))


def straight(run: Path, sets: list[str]) -> float:
    """A run that nobody disturbs. -> seconds."""
    attempt = Attempt(run, sets, resume=False)
    code, console = attempt.end(600)
    if code:
        sys.exit(f"{run.name} ended with {code}:\n{console}")
    return attempt.seconds


def disturbed(run: Path, sets: list[str], victim: str, after: int) -> int:
    """Kill `victim` once `after` steps are trained, resume to the end. -> steps trained before the kill."""
    attempt = Attempt(run, sets, resume=False)
    if after:
        there = attempt.wait(lambda: len(attempt.steps()) >= after)
    else:
        there = attempt.wait(lambda: (run / "recipe.json").exists() and attempt.child("eval") is not None)
        time.sleep(1.0)
    if not there or not attempt.wait(lambda: attempt.kill(victim)):
        sys.exit(f"{victim} could not be killed after {after} steps:\n{attempt.end()[1]}")
    code, console = attempt.end()
    if code == 0:
        sys.exit(f"the run was done before {victim} could be killed after {after} steps")
    trained = len(attempt.steps())
    code, console = Attempt(run, [], resume=True).end(600)
    if code:
        sys.exit(f"the resume after {victim}@{after} ended with {code}:\n{console}")
    return trained


def cost(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Seconds a step and an evaluation at the recipe's own size, in both modes."""
    modes = {"deterministic": ["launch.deterministic=true"], "staleness 0": ["train.max_staleness=0"]}
    rows: list[dict[str, Any]] = []
    for mode, sets in {**modes, "as in the recipe": []}.items():
        run = folder / mode.replace(" ", "-")
        wall_s = straight(run, [f"train.steps={steps}", "eval.every=10", *sets])
        # the gap between two steps' records: evaluations that hold the engine are in it, the median leaves them out
        gaps = [after - before for before, after in itertools.pairwise(r["time"] for r in trained(records(run)))]
        evals = [r["eval_wall_s"] for r in records(run) if "eval_wall_s" in r]
        rows.append({"mode": mode, "step_s": statistics.median(gaps), "eval_s": statistics.median(evals)})
        rows[-1] |= {"run_s": wall_s, "deterministic_step_over_it": rows[0]["step_s"] / rows[-1]["step_s"]}
    return rows


def main() -> None:
    parser = options(__doc__, steps=8, timing_steps={20: "0: no timing"})
    parser.add_argument("--points", nargs="*", default=[f"{name}@{n}" for n in (0, 3, 6) for name in CHILDREN])
    args = parser.parse_args()
    sets = [f"train.steps={args.steps}", *SMALL]
    rows: list[dict[str, Any]] = []
    with folder() as name:

        def judge(run: str, after: int | None, *, whole: bool) -> None:
            odd = difference(name / "first", name / run, whole=whole)
            rows.append({"run": run, "after_steps": after, "files": len(digests(name / "first")), "differs": odd[:6]})
            say(rows[-1])

        straight(name / "first", sets)
        straight(name / "second", sets)
        judge("second", None, whole=True)
        for point in args.points:
            victim, _, after = point.partition("@")
            judge(point, disturbed(name / point, sets, victim, int(after)), whole=False)
        modes = cost(name, args.timing_steps) if args.timing_steps else []
    show(args, {"rows": rows, "modes": modes})
    sys.exit(1 if any(row["differs"] for row in rows) else 0)


if __name__ == "__main__":
    main()
