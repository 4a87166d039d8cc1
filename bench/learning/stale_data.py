"""What data of an earlier policy do to learning: algorithms, or sources of M2PO's limits, at the smallest scale.

    python bench/learning/stale_data.py algorithms [--staleness 0 8 64] [--seeds 0 1 2] [--steps 120] [--plot FILE.svg]
    python bench/learning/stale_data.py limits --jobs 32 [--ways grpo "batch 0.003"] [--staleness 0 2 8] [--tier 1]

`algorithms`: what M2PO claims: grpo (clip 0.2) and the three published forms of M2PO with their published bounds (mask
and waterfill 0.04, clip 0.01). Printed are medians of the seeds. About a minute a run on one core.

`limits`: where M2PO's limits come from (limits.py): learning curves and cut tokens of each way. Printed are means of
the seeds. Ways of tier 1 come first. Two to five minutes a run on a core.

Every run is one file in --out; what is there is not run again, so a cut-off command can be given again, and `--minutes
0` only prints. A run that fails is a row and ends no other; the next command tries it again, and the exit status is 1.
Runs are independent processes of one thread. `--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from astracli.config import recipe_io
from astracli.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import RECIPE, more_options, say, show

from learning.curves import of_seeds, panels
from learning.limits import TIERS, WAYS, LimitsRun
from learning.staleness import ALGORITHMS, Run

Task = tuple[str, int, int]
"""(way, staleness, seed)"""
FIGURES = {
    "algorithms": ("clip_fraction", "ratio_mean", "grad_norm"),
    "limits": ("area", "cut_itself", "cut_published", "cut_ppo", "ratio_mean", "grad_norm", "cpu_s"),
}


def wanted(args: argparse.Namespace) -> Iterator[Task]:
    """By tier, seeds outermost: whatever is done when time is over can be compared."""
    tiers = {0: args.ways} if args.what == "algorithms" else {
        tier: [label for label, way in WAYS.items() if way in ways and label in args.ways]
        for tier, ways in TIERS.items()
        if args.tier is None or tier <= args.tier
    }  # fmt: skip
    for labels in tiers.values():
        yield from ((label, k, seed) for seed in args.seeds for k in args.staleness for label in labels)


def place(args: argparse.Namespace, label: str, staleness: int, seed: int) -> Path:
    return Path(args.out) / f"{label.replace(' ', '-')}_k{staleness}_s{seed}.json"


def ended_well(path: Path) -> bool:
    return path.exists() and "failed" not in json.loads(path.read_text())


def one(task: tuple[str, int, int, argparse.Namespace]) -> dict[str, Any]:
    """The run's document, which is also its file. A failure is one too: the other runs have nothing to do with it."""
    torch.set_num_threads(1)
    label, staleness, seed, args = task
    found: dict[str, Any] = {"algorithm": label, "staleness": staleness, "seed": seed, "steps": args.steps}
    try:
        found |= (LimitsRun if args.what == "limits" else Run)(label, staleness, seed, args).run()
    except Exception as error:
        found["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        traceback.print_exc()
    path = place(args, label, staleness, seed)
    working = path.with_suffix(".tmp")
    working.write_text(json.dumps(found))
    os.replace(working, path)
    return found


def run_all(left: list[Task], args: argparse.Namespace) -> None:
    """`--jobs` at once, each a file; those that have not ended after `--minutes` are given up."""
    end = time.monotonic() + 60 * args.minutes
    jobs = max(1, min(args.jobs, len(left)))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # ends what runs when it is left
        going = pool.imap_unordered(one, [(*each, args) for each in left])
        for count in range(len(left)):
            try:
                r = going.next(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print(f"time is over: {count} of {len(left)} runs ended", file=sys.stderr)
                return
            outcome = {"failed": r["failed"]} if "failed" in r else {"last": r["curve"][-1][1], "cpu_s": r["cpu_s"]}
            say(run=f"{count + 1}/{len(left)}", way=r["algorithm"], staleness=r["staleness"], seed=r["seed"], **outcome)
        pool.close()
        pool.join()


def table(runs: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way and staleness, of the seeds that did not fail."""
    middle: Callable[[list[float]], float] = statistics.median if args.what == "algorithms" else statistics.mean
    rows = []
    for staleness in sorted({r["staleness"] for r in runs}):
        for label in args.ways:
            of = [r for r in runs if (r["staleness"], r["algorithm"]) == (staleness, label) and "failed" not in r]
            if not of:
                continue
            last = [r["curve"][-1][1] for r in of]
            best = middle([max(value for _, value in r["curve"]) for r in of])
            row = {"way": label, "staleness": staleness, "seeds": len(of), "last": middle(last), "lowest": min(last)}
            row |= {"best": best, "ended_early": sum(r["ended"] is not None for r in of)}
            rows.append(row | {name: middle([r[name] for r in of]) for name in FIGURES[args.what]})
    return rows


def plot(runs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """One panel a staleness, a line a way."""

    def line(label: str, staleness: int) -> Any:
        of = [r for r in runs if (r["staleness"], r["algorithm"]) == (staleness, label) and "failed" not in r]
        return of_seeds([dict(map(tuple, r["curve"])) for r in of])

    levels = sorted({r["staleness"] for r in runs})
    panels({f"staleness {k}": {label: line(label, k) for label in args.ways} for k in levels}, args.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    own: dict[str, dict[str, Any]] = {
        "algorithms": {"staleness": [0, 8, 64], "steps": 120, "every": 10, "samples": 4, "out": Path("staleness")},
        "limits": {"staleness": [0, 2, 8], "steps": 80, "every": 20, "samples": 8, "out": Path("limits")},
    }
    for what, defaults in own.items():
        command = more_options(
            commands.add_parser(what), **defaults, json=False, seeds=[0, 1, 2], plot=Path, jobs={1: "runs at once"},
            between={4: "samples an item, of the evaluations before the last"}, set="of the recipe",
            minutes={1e6: "after which runs are given up; 0 only prints"},
        )  # fmt: skip
        labels = list(ALGORITHMS if what == "algorithms" else WAYS)
        command.add_argument("--ways", nargs="+", choices=labels, default=labels)
    command.add_argument("--tier", type=int, choices=list(TIERS), help="leave out later tiers")
    more_options(command, row_tokens={26: "of a row, from which `microbatch` is divided"})
    args = parser.parse_args()
    try:
        recipe_io.load(RECIPE, args.set)
    except UserError as error:
        parser.error(f"--set: {error}")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    everything = list(wanted(args))
    left = [each for each in everything if not ended_well(place(args, *each))]
    if left and args.minutes:
        run_all(left, args)
    runs = [json.loads(path.read_text()) for each in everything if (path := place(args, *each)).exists()]
    if {r["steps"] for r in runs} - {args.steps}:
        print(f"warning: some runs in {args.out} have other than {args.steps} steps", file=sys.stderr)
    if args.plot:
        plot(runs, args)
    failed = [{key: r[key] for key in ("algorithm", "staleness", "seed", "failed")} for r in runs if "failed" in r]
    show(args, {"rows": table(runs, args), "failed": failed} | ({"runs": runs} if args.json else {}))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
