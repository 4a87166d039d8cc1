"""Do trainer and engine compute the same model, and packed rows the same gradient? The figures that every run records.

    python bench/gpu_parity.py [--model DIR ...] [--steps 4] [--attention triton ...] [--engine-path P] [--json]
    python bench/gpu_parity.py --device cpu

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
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from meter import MemoryWatch

from astracli.training.agreement import TIMES_NOISE

LIMITS = {"parity_mean_abs": 1e-2, "ratio_off": 2e-3, "rows_gradient_error": 1e-2}


def train(model: str, attention: str, args: argparse.Namespace, run: Path) -> list[dict[str, Any]]:
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
        one = {"device": "cuda", "rollout_gpus": 1, "train_gpus": 1, "share_gpus": "true"}
        settings |= {f"resources.{key}": value for key, value in one.items()}
        settings |= {"rollout.sglang.mem_fraction_static": 0.2, "rollout.sglang.attention_backend": attention}
        if args.engine_path:
            settings["resources.engine.env.PYTHONPATH"] = args.engine_path
    command = [sys.executable, "-m", "astracli", "train", "--recipe", "qwen3.5-tiny-m2po-delta", "--run-dir", str(run)]
    settings |= dict(pair.split("=", 1) for pair in args.set)
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    # what it says goes to stderr as it comes: of a run that is cut off, that is all there is
    done = subprocess.run(command, cwd=run.parent, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["process"] == "trainer" and "loss" in r]


def measure(model: str, attention: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    watch = MemoryWatch()
    if args.device == "cuda":
        watch.start()
    records = train(model, attention, args, folder / f"{Path(model).name.replace(':', '-')}-{attention}")
    watch.done.set()
    own = [r for r in records if "parity_mean_abs" in r]
    tokens = [r["parity_tokens"] for r in own]

    def mean(name: str) -> float:
        return sum(r[name] * n for r, n in zip(own, tokens, strict=True)) / sum(tokens)

    row = {
        "model": model,
        "attention": attention,
        "tokens": int(sum(tokens)),
        "parity_mean_abs": mean("parity_mean_abs"),
        "parity_max_abs": max(r["parity_max_abs"] for r in own),
        "parity_noise": max((r["parity_noise"] for r in records if "parity_noise" in r), default=None),
        "parity_kl": mean("parity_kl"),
        "ratio_mean": mean("parity_ratio_mean"),
        "rows_max_abs": max(r["rows_max_abs"] for r in records if "rows_max_abs" in r),
        "rows_gradient_error": max(r["rows_gradient_error"] for r in records if "rows_gradient_error" in r),
        "gradient_own_shape": max((r[own] for r in records if (own := "rows_gradient_own_shape") in r), default=None),
        "rows_gradient_noise": max(r.get("rows_gradient_noise", 0.0) for r in records),
        "step_s": statistics.median(r["step_s"] for r in records),
        "steps": len(records),
        "gpu_gib": watch.peak_gib or None,
    }
    off = row | {"ratio_off": abs(row["ratio_mean"] - 1.0)}
    noise = TIMES_NOISE * (row["parity_noise"] or 0.0)
    limits = LIMITS | {"parity_mean_abs": max(LIMITS["parity_mean_abs"], noise)}
    return row | {"over": [name for name, limit in limits.items() if not off[name] <= limit]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["astra:tiny"])
    parser.add_argument("--attention", nargs="+", default=["triton"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of the recipe")
    parser.add_argument("--engine-path", help="PYTHONPATH of the environment that holds SGLang")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [measure(model, attention, args, Path(name)) for model in args.model for attention in args.attention]
    if args.json:
        print(json.dumps(rows))
    else:
        columns = ("model", "attention", "tokens", "parity_mean_abs", "parity_noise", "parity_max_abs", "parity_kl",
                   "ratio_mean", "rows_max_abs", "rows_gradient_error", "gradient_own_shape", "rows_gradient_noise",
                   "step_s", "steps", "gpu_gib")  # fmt: skip
        print("  ".join(f"{column:>19}" for column in columns))
        for row in rows:
            cells = [f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
            print("  ".join(f"{cell[-19:]:>19}" for cell in cells))
    if over := [f"{row['model']} with {row['attention']}: {', '.join(row['over'])}" for row in rows if row["over"]]:
        sys.exit("over the limit: " + "; ".join(over))


if __name__ == "__main__":
    main()
