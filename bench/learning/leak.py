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
import subprocess
import sys
from pathlib import Path
from typing import Any

MODES = ("reset", "ignored")
RECIPE = "qwen3.5-tiny-m2po-delta"
MEANS = ("parity_mean_abs", "ratio_mean", "clip_fraction", "grad_norm", "m2_limit", "entropy", "reward_mean")
CHECKS = ("rows_max_abs", "rows_gradient_error")
LARGEST = "parity_max_abs"
"""Not in documents that were written before it was kept: printed as nan."""


def train(mode: str, seed: int, args: argparse.Namespace) -> Path:
    """The run directory of one finished run."""
    run = Path(args.run) / f"{mode}-{seed}"
    if (run / "summary.json").is_file():
        return run
    settings = [f"seed={seed}", "train.packing=packed", f"train.row_boundaries={mode}", "eval.every=10"]
    settings += ["train.rows_check_every=10", *([f"train.steps={args.steps}"] if args.steps else []), *args.set]
    command = [sys.executable, "-m", "astracli", "train", "--recipe", args.recipe, "--run-dir", str(run.resolve())]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, cwd=args.run, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return run


def read(run: Path) -> dict[str, Any]:
    """One run's document: what its trainer measured and its evaluations."""
    recipe = json.loads((run / "recipe.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["process"] == "trainer" and "loss" in r]
    with (run / "eval" / "eval.csv").open(encoding="utf-8", newline="") as file:
        overall = [row for row in csv.DictReader(file) if row["benchmark"] == "overall"]
    curve = [(int(row["step"]), float(row["avg_at_n"])) for row in overall]
    figures = {name: [(r["step"], r[name]) for r in steps if name in r] for name in (*MEANS, *CHECKS, LARGEST)}
    return {
        "mode": recipe["train"]["row_boundaries"],
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "steps": len(steps),
        "curve": sorted(curve),
        "figures": figures,
    }


def mean(run: dict[str, Any], name: str) -> float:
    return statistics.mean(value for _, value in run["figures"][name])


def table(runs: list[dict[str, Any]]) -> None:
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
    heads = [f"{mode}: {len(of)} x {of[0]['steps'] if of else 0} steps" for mode, of in groups.items()]
    print(f"{'median of the seeds (lowest to highest)':42}" + "".join(f"{head:>34}" for head in heads))
    for label, figure in rows:
        cells = []
        for of in groups.values():
            values = sorted(figure(r) for r in of)
            cells.append(f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})" if values else "-")
        print(f"{label:42}" + "".join(f"{cell:>34}" for cell in cells))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Three panels; a line is the median of its seeds, the band reaches from the lowest to the highest."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "leak"
    panels = (("held-out avg@n", "curve"), ("mean ratio", "ratio_mean"), ("clipped tokens", "clip_fraction"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for axis, (title, name) in zip(axes, panels, strict=True):
        for mode in MODES:
            of = [dict(map(tuple, r["curve"] if name == "curve" else r["figures"][name]))
                  for r in runs if r["mode"] == mode]  # fmt: skip
            steps = sorted(set.intersection(*map(set, of))) if of else []
            values = [[curve[step] for curve in of] for step in steps]
            if not values:
                continue
            (line,) = axis.plot(steps, [statistics.median(v) for v in values], label=f"boundaries {mode}")
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15,
                              color=line.get_color(), lw=0)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="train both modes below DIR")
    source.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="finished runs of either mode")
    source.add_argument("--json-in", type=Path, nargs="+", metavar="FILE", help="what --out wrote")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--set", action="append", default=[], help="a.b=c, as `astra train --set`")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
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
                runs.append(read(train(mode, seed, args)))
                print(f"seed {seed}, boundaries {mode}: {runs[-1]['curve'][-1][1]:.3f}", file=sys.stderr, flush=True)
    if args.out:
        args.out.write_text(json.dumps(runs))
    if args.plot:
        plot(runs, args.plot)
    table(runs)


if __name__ == "__main__":
    main()
