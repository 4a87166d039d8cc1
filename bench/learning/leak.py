"""What a leak through packed rows does to a run: boundaries reset and boundaries ignored, side by side.

    python bench/learning/leak.py --run DIR [--seeds 0 1 2] [--steps 80] [--plot leak.svg] [--out leak.json]
    python bench/learning/leak.py --run DIR --recipe qwen3.5-small-m2po-delta --set model.path=SMALL --set ...
    python bench/learning/leak.py --runs RESET_RUN IGNORED_RUN [...] [--plot leak.svg]

A run differs from its partner in `train.row_boundaries` alone: with `ignored` the convolution and the delta rule of a
packed row run from one sample into the next, while attention and positions restart, which is what a trainer computes
that tells transformers nothing. Everything else, engine included, is right. Printed are the trainer's own metrics:
difference of log-probability to the engine on tokens of its own version, mean ratio, share of clipped tokens, gradient
of joined rows against each alone (every `train.rows_check_every` steps), the norm of the gradient, reward, evaluation.
Finished runs in DIR are taken as they are. About 90 seconds a run on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import RECIPE, options, records, say, show, train, trained

from learning.curves import of_seeds, panels

MODES = ("reset", "ignored")
MEANS = ("parity_mean_abs", "ratio_mean", "clip_fraction", "grad_norm", "m2_limit", "entropy", "reward_mean")
CHECKS = ("rows_max_abs", "rows_gradient_error")
LARGEST = "parity_max_abs"
"""Not in documents that were written before it was kept: printed as nan."""


def run_of(mode: str, seed: int, args: argparse.Namespace) -> Path:
    """The run directory of one finished run."""
    run = Path(args.run) / f"{mode}-{seed}"
    if (run / "summary.json").is_file():
        return run
    settings = [
        f"seed={seed}",
        "train.packing=packed",
        "train.share_prompts=false",
        f"train.row_boundaries={mode}",
        "eval.every=10",
    ]
    settings += ["train.rows_check_every=10", *([f"train.steps={args.steps}"] if args.steps else []), *args.set]
    train(run.resolve(), settings, args.recipe)
    return run


def read(run: Path) -> dict[str, Any]:
    """One run's document: what its trainer measured and its evaluations."""
    recipe = json.loads((run / "recipe.json").read_text())
    steps = trained(records(run))
    with (run / "eval" / "eval.csv").open(encoding="utf-8", newline="") as file:
        overall = [row for row in csv.DictReader(file) if row["benchmark"] == "overall"]
    curve = [(int(row["step"]), float(row["avg_at_n"])) for row in overall]
    figures = {name: [(r["step"], r[name]) for r in steps if name in r] for name in (*MEANS, *CHECKS, LARGEST)}
    return {
        "mode": recipe["train"]["row_boundaries"], "recipe": recipe["name"], "seed": recipe["seed"],
        "steps": len(steps), "curve": sorted(curve), "figures": figures,
    }  # fmt: skip


def mean(run: dict[str, Any], name: str) -> float:
    return statistics.mean(value for _, value in run["figures"][name])


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median of the seeds (lowest to highest) in both modes."""
    rows = (
        ("log-probability, trainer - engine, mean", lambda r: mean(r, "parity_mean_abs")),
        (
            "log-probability, trainer - engine, largest",
            lambda r: max((v for _, v in r["figures"].get(LARGEST, [])), default=float("nan")),
        ),
        ("log-probability, joined - alone, largest", lambda r: max(v for _, v in r["figures"]["rows_max_abs"])),
        ("gradient, joined - alone, at the start", lambda r: r["figures"]["rows_gradient_error"][0][1]),
        ("gradient, joined - alone, median", lambda r: statistics.median(v for _, v in r["figures"][CHECKS[1]])),
        ("mean ratio", lambda r: mean(r, "ratio_mean")),
        ("mean ratio of step 0, which is on-policy", lambda r: r["figures"]["ratio_mean"][0][1]),
        ("clipped tokens", lambda r: mean(r, "clip_fraction")),
        ("M2PO's cap on |log ratio|", lambda r: mean(r, "m2_limit")),
        ("gradient norm", lambda r: mean(r, "grad_norm")),
        ("reward, last ten steps", lambda r: statistics.mean(v for _, v in r["figures"]["reward_mean"][-10:])),
        ("evaluation, first", lambda r: r["curve"][0][1]),
        ("evaluation, half way", lambda r: r["curve"][len(r["curve"]) // 2][1]),
        ("evaluation, last", lambda r: r["curve"][-1][1]),
        ("evaluation, best", lambda r: max(value for _, value in r["curve"])),
    )
    groups = {mode: [r for r in runs if r["mode"] == mode] for mode in MODES}
    found = [{"figure": "runs", **{mode: len(of) for mode, of in groups.items()}}]
    for label, figure in rows:
        found.append({"figure": label})
        for mode, of in groups.items():
            if values := sorted(figure(r) for r in of):
                found[-1][mode] = f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})"
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Three panels, a line a mode."""
    shown = {"held-out avg@n": "curve", "mean ratio": "ratio_mean", "clipped tokens": "clip_fraction"}

    def line(mode: str, name: str) -> Any:
        of = [r["curve"] if name == "curve" else r["figures"][name] for r in runs if r["mode"] == mode]
        return of_seeds([dict(map(tuple, curve)) for curve in of])

    panels({title: {f"boundaries {m}": line(m, name) for m in MODES} for title, name in shown.items()}, path)


def main() -> None:
    parser = options(
        __doc__, recipe=RECIPE, seeds=[0, 1, 2], steps={int: "instead of the recipe's"}, out=Path, plot=Path,
        set="as `astra train --set`",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="train both modes below DIR")
    source.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="finished runs of either mode")
    source.add_argument("--json-in", type=Path, nargs="+", metavar="FILE", help="what --out wrote")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if args.json_in:
        runs = [run for file in args.json_in for run in json.loads(file.read_text())]
    elif args.runs:
        runs = [read(run) for run in args.runs]
    else:
        args.run.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for mode in MODES:
                runs.append(read(run_of(mode, seed, args)))
                say(seed=seed, boundaries=mode, last=runs[-1]["curve"][-1][1])
    if args.out:
        args.out.write_text(json.dumps(runs))
    if args.plot:
        plot(runs, args.plot)
    show(args, {"rows": table(runs)})


if __name__ == "__main__":
    main()
