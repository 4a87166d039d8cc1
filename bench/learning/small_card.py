"""Does a model of 4.2 B parameters learn with LoRA on a small card? `qwen3.5-4b-lora-24gb`, held to its memory.

    python bench/learning/small_card.py --gib 24 [--steps 50] [--folder F] [--engine-path PATH]
    python bench/learning/small_card.py --gib 48 --side-by-side --steps 8
    python bench/learning/small_card.py --shape tiny --device cpu --steps 10

The run is held to `--gib` by `resources.gpu_memory_gib`. The weights are random (`bench/random_checkpoint.py`; `--model
DIR` takes one that is there), so the task is one for any weights: the reward is the share of even token ids in a
completion, 0.5 for a model that has learned nothing. Printed: the reward and what a step took by tenths of the run, the
most memory that nvidia-smi saw beside the plan, the size of versions and pauses. Exit 1 when the run failed, an engine
was restarted or resynced, more than `--gib` was seen, or the reward of the last tenth is not above that of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.full_size import checkpoint
from shared import GIB, Record, command, folder, gpu_settings, options, records, say, show, start, trained, watched

REWARD = '''"""The share of even token ids in a completion."""


def even(tokens):
    return sum(int(token) % 2 == 0 for token in tokens) / max(1, len(tokens))
'''
PARTS = 10


def settings(args: argparse.Namespace, model: Path) -> list[str]:
    """What the bench says over the recipe; the last word is the user's."""
    values: Record = {
        "model.path": model, "data.source": "arithmetic", "data.reward": "even_tokens:even", "eval.every": 0,
        "train.steps": args.steps, "train.batch_groups": args.groups, "train.learning_rate": args.learning_rate,
        "train.parity_tolerance": 0.5, "rollout.max_new_tokens": args.new_tokens, "checkpoint.every": 100_000,
        "rollout.context_length": args.new_tokens + 128, "algorithm.drop_equal_groups": "false",
    }  # fmt: skip
    if args.device == "cuda":
        values |= gpu_settings(args) | {"resources.gpu_memory_gib": args.gib}
        values["resources.share_mode"] = "side_by_side" if args.side_by_side else "time_sharing"
    else:
        values |= dict.fromkeys(("resources.rollout_gpus", "resources.train_gpus"), 0)
        values |= {"resources.device": "cpu", "resources.share_gpus": "false", "resources.share_mode": "auto"}
    return [f"{key}={value}" for key, value in values.items()] + args.set


def by_part(steps: Sequence[Record]) -> list[Record]:
    """Means over tenths of the run."""
    size = max(1, len(steps) // PARTS)
    found = []
    for first in range(0, len(steps), size):
        some = steps[first : first + size]
        names = ("reward_mean", "entropy", "kl", "grad_norm", "parity_mean_abs", "step_s", "wait_s")
        known = {name: [r[name] for r in some if r.get(name) is not None] for name in names}
        means = {name: statistics.fmean(values) if values else None for name, values in known.items()}
        found.append({"steps": f"{some[0]['step']}-{some[-1]['step']}", **means})
    return found


def judge(run: Path, steps: Sequence[Record], seen_gib: float) -> Record:
    plan = json.loads((run / "plan.json").read_text())
    uses = {use["place"]: use for use in plan["memory_by_place"]}
    updates = [r for r in records(run) if "pause_s" in r]
    later = [r for r in updates if r["step"] > 1] or updates
    summary = json.loads((run / "summary.json").read_text())
    found: dict[str, Any] = {
        "steps": len(steps), "state": summary["state"], "restarts": sum(summary["restarts"].values()),
        "resyncs": sum(r["resyncs"] for r in updates), "seen_gib": seen_gib,
    }  # fmt: skip
    for place, use in uses.items():
        if place != "host":
            found |= {"planned_gib": use["under_load"] / GIB, "may_use_gib": use["has"] / GIB}
    found["pause_ms_p50"] = 1000 * statistics.median(r["pause_s"] for r in later)
    found["version_mb_p50"] = statistics.median(r.get("delta_bytes") or 0 for r in steps) / 1e6
    return found | {"by tenths of the run": by_part(steps)}


def main() -> None:
    parser = options(
        __doc__, gib=24.0, side_by_side=False, steps=50, groups=8, new_tokens=64, learning_rate=1e-3, shape="4b",
        device=("cuda", "cpu"), model={str: "a checkpoint"}, folder={str: "where model and run lie"},
        engine_path={str: "PYTHONPATH of the environment with SGLang"}, set="changes the recipe",
    )  # fmt: skip
    args = parser.parse_args()
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with folder(args.folder) as place:
        (place / "even_tokens.py").write_text(REWARD)
        run = place / "run"
        words = command("train", run, settings(args, checkpoint(args, place)), "qwen3.5-4b-lora-24gb")
        say(command=" ".join(words))
        with watched(args.device) as watch:
            code = start(words, place, place / "train.log").wait()
        steps = trained(records(run))
        if code or len(steps) < 2:
            sys.exit(
                f"the run ended with {code} after {len(steps)} steps:\n{(place / 'train.log').read_text()[-3000:]}"
            )
        found = judge(run, steps, watch.peak_gib)
    parts = found["by tenths of the run"]
    show(args, found)
    over = args.device == "cuda" and found["seen_gib"] > args.gib
    learned = parts[-1]["reward_mean"] > parts[0]["reward_mean"]
    sys.exit(bool(found["restarts"] or found["resyncs"] or over or not learned))


if __name__ == "__main__":
    main()
