"""Do trainer and engine compute the same model, and packed rows the same gradient? The figures that every run records.

    python bench/loop/parity.py [--model DIR ...] [--steps 4] [--attention triton ...] [--engine-path P] [--json]
    python bench/loop/parity.py --device cpu

Runs `astra train` on-policy (`train.max_staleness = 0`, one minibatch) for each model and serving attention, SGLang
and trainer on one GPU, and prints over the run's tokens: mean and largest |difference of log-probability| between
trainer and engine, their KL estimate, the mean ratio, and the trainer's own start-up check (joined rows against each
alone: largest difference of log-probability, relative error of the gradient in one shape, and in shapes of their own).
Where the first is over 0.01 or the last over 1 %, it also says how far a unit in bf16's last place at every block moves
them: the noise. Exits 1 when a mean is
over 0.01 and over twice that noise, a gradient error over 1 %, or a mean ratio further than 0.002 from 1. `gpu_gib` is
the most memory that all of the run's processes held on the GPU together (None: a CPU). DIR: `python
bench/random_checkpoint.py DIR`, whose weights are as restless as a model can be, or `python scripts/make_small.py DIR
--shape 4b`, which has learned something; both are trained with `reward = "probe"`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from astracli.training.agreement import TIMES_NOISE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, gpu_settings, options, records, show, train, trained, watched

LIMITS = {"parity_mean_abs": 1e-2, "ratio_off": 2e-3, "rows_gradient_error": 1e-2}


def run_of(model: str, attention: str, args: argparse.Namespace, run: Path) -> list[dict[str, Any]]:
    """The trainer's records of one run."""
    settings: dict[str, Any] = {
        "model.path": model,
        "train.steps": args.steps,
        "train.max_staleness": 0,
        "train.minibatches": 1,
        "train.batch_groups": args.groups,
        "train.learning_rate": 1e-6,
        "train.parity_tolerance": 10,  # to measure, not to stop
        "eval.every": 0,
        "checkpoint.every": 0,
    }
    if model != "astra:tiny":
        settings |= {"data.reward": "probe", "rollout.max_new_tokens": 256, "rollout.context_length": 512}
        settings |= {"train.activation_checkpointing": "full", "train.tokens_per_microbatch": 8192}
    if args.device == "cuda":
        settings |= gpu_settings(args)
        settings |= {"rollout.sglang.mem_fraction_static": 0.2, "rollout.sglang.attention_backend": attention}
    settings |= dict(pair.split("=", 1) for pair in args.set)
    train(
        run, settings, console=None
    )  # what it says goes to stderr as it comes: of a run cut off, that is all there is
    return trained(records(run))


def measure(model: str, attention: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with watched(args.device) as watch:
        found = run_of(model, attention, args, folder / f"{Path(model).name.replace(':', '-')}-{attention}")
    own = [r for r in found if "parity_mean_abs" in r]
    tokens = [r["parity_tokens"] for r in own]

    def mean(name: str) -> float:
        return sum(r[name] * n for r, n in zip(own, tokens, strict=True)) / sum(tokens)

    row = {
        "model": model, "attention": attention, "tokens": int(sum(tokens)), "parity_mean_abs": mean("parity_mean_abs"),
        "parity_max_abs": max(r["parity_max_abs"] for r in own),
        "parity_noise": max((r["parity_noise"] for r in found if "parity_noise" in r), default=None),
        "parity_kl": mean("parity_kl"), "ratio_mean": mean("parity_ratio_mean"),
        "rows_max_abs": max(r["rows_max_abs"] for r in found if "rows_max_abs" in r),
        "rows_gradient_error": max(r["rows_gradient_error"] for r in found if "rows_gradient_error" in r),
        "gradient_own_shape": max((r[own] for r in found if (own := "rows_gradient_own_shape") in r), default=None),
        "rows_gradient_noise": max(r.get("rows_gradient_noise", 0.0) for r in found),
        "step_s": statistics.median(r["step_s"] for r in found), "steps": len(found), "gpu_gib": watch.peak_gib or None,
    }  # fmt: skip
    off = row | {"ratio_off": abs(row["ratio_mean"] - 1.0)}
    noise = TIMES_NOISE * (row["parity_noise"] or 0.0)
    limits = LIMITS | {"parity_mean_abs": max(LIMITS["parity_mean_abs"], noise)}
    return row | {"over": [name for name, limit in limits.items() if not off[name] <= limit]}


def main() -> None:
    parser = options(
        __doc__, model=["astra:tiny"], attention=["triton"], steps=4, groups=8, device=("cuda", "cpu"),
        set="more settings of the recipe", engine_path={str: "PYTHONPATH of the environment that holds SGLang"},
    )  # fmt: skip
    args = parser.parse_args()
    with folder() as name:
        rows = [measure(model, attention, args, name) for model in args.model for attention in args.attention]
    show(args, {"rows": rows})
    if over := [f"{row['model']} with {row['attention']}: {', '.join(row['over'])}" for row in rows if row["over"]]:
        sys.exit("over the limit: " + "; ".join(over))


if __name__ == "__main__":
    main()
