"""The whole loop at 4.2 B parameters: `astra train` for 20 steps that nobody touches, and where its seconds go.

    python bench/loop/full_size.py [--layout 1+1 | shared | 1+2] [--time-sharing] [--steps 20] [--engine-path PATH]
    python bench/loop/full_size.py --shape tiny --device cpu [--layout 1+2]          a laptop, the embedded engine

`1+1`: engine and trainer have a GPU each. `shared`: both on one. `1+2`: the trainer on two, the engine on the first of
them; with `--time-sharing` they share it in time. Weights are random (`--model DIR` takes a checkpoint that
`bench/random_checkpoint.py` wrote, else one is made), the reward is `probe`, transfer is `delta`. The run is
interrupted once `--steps` versions are in the engine, so that no checkpoint and no export is written; one that has not
come so far after `--limit-s` is interrupted too. What a run did is printed, whatever its end, and the most memory that
was seen of each GPU beside what the plan counts there. The first `--skip` steps, in which kernels are compiled, do not
count. `--set KEY=VALUE` changes the recipe. Exit 1 when fewer steps were trained, an engine was restarted or resynced,
or the memory seen is more than a tenth away from the plan: of all GPUs together, or over it of any.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astracli.machine.memory import Component, MemoryRow
from astracli.plan.memory import on_gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import (
    GIB,
    MemoryWatch,
    Record,
    command,
    folder,
    gpu_settings,
    options,
    records,
    say,
    show,
    spread,
    trained,
    watched,
)

from loop import waterfall

HERE = Path(__file__).resolve().parents[1]
LAYOUTS = ("1+1", "shared", "1+2")
PHASES = {
    "wait": ("wait_s",), "batch and checks": ("batch_s", "check_s"), "score": ("score_s",), "forward": ("forward_s",),
    "backward": ("backward_s",), "optimizer": ("optimizer_s",), "publish": ("publish_s",),
}  # fmt: skip
"""Of a trainer's step; what is left of `step_s` is shown as `other`."""
UPDATE = ("fetch_s", "transfer_s", "stage_s", "pause_s", "apply_s", "verify_s", "gap_s", "readback_s")
TURN = ("release_s", "away_s", "resume_s")
LIMIT = 0.1
"""By how much of the plan the memory that is seen may differ from it."""


def settings(args: argparse.Namespace, model: Path) -> list[str]:
    """What the bench says over `random-4b.toml`; the last word is the user's."""
    gpus = {"1+1": (1, 1, False), "shared": (1, 1, True), "1+2": (1, 2, True)}[args.layout]
    values: dict[str, Any] = {
        "model.path": model,
        "resources.device": args.device,
        "train.steps": args.steps + 1000,
        "train.batch_groups": args.groups,
        "train.parity_tolerance": 0.5,  # of random weights: what is measured here is time
        "rollout.max_new_tokens": args.new_tokens,
        "rollout.context_length": args.new_tokens + 512,
        "rollout.max_running_requests": args.running,
        "weights.full_interval": 10,
        "checkpoint.every": 100_000,
        "launch.max_restarts": 2,
    }
    if args.device == "cuda":
        values |= gpu_settings(args, gpus[1], shared=gpus[2])
        if args.time_sharing:
            values["resources.share_mode"] = "time_sharing"
    else:
        values |= dict.fromkeys(("resources.rollout_gpus", "resources.train_gpus"), 0)
        values |= {"resources.share_gpus": False, "resources.train_ranks": gpus[1]}
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()] + args.set


def checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    if args.model:
        return Path(args.model).resolve()
    out = folder / f"random-{args.shape}"
    words = [sys.executable, str(HERE / "random_checkpoint.py"), str(out), "--shape", args.shape]
    log = folder / "checkpoint.log"
    if shared.start([*words, "--device", args.device], folder, log).wait():
        sys.exit(f"no checkpoint was made:\n{log.read_text()[-3000:]}")
    return out


def train(args: argparse.Namespace, model: Path, run: Path) -> tuple[int, str]:
    """(exit code, last lines) of the run, which is interrupted when it has come far enough or the time is over."""
    words = command("train", run, settings(args, model), str(HERE / "random-4b.toml"))
    begun, said, log = time.monotonic(), -1, run.parent / "train.log"
    process = shared.start(words, run.parent, log)
    while process.poll() is None:
        found = records(run)
        done = len(trained(found))
        if done != said:
            said = done
            say(at_s=round(time.monotonic() - begun, 1), steps=done)
        served = max((r["step"] for r in found if "pause_s" in r), default=0)
        if served >= args.steps or time.monotonic() - begun > args.limit_s:
            os.kill(process.pid, signal.SIGINT)
            break
        time.sleep(0.25)
    return process.wait(), log.read_text()[-3000:]


def mean(rows: Sequence[Record], *names: str) -> float:
    return statistics.fmean(sum(r.get(name) or 0.0 for name in names) for r in rows)


def of_all(rows: Sequence[Record], name: str) -> dict[str, float] | None:
    return spread(float(r[name]) for r in rows if isinstance(r.get(name), int | float))


KEYS = ("process", "where", "bytes", "basis", "fixed", "away")
"""Of a row of memory; which part of its process it is counts for nothing here."""


def memory(run: Path, watch: MemoryWatch) -> list[Record]:
    """What was seen of each GPU of the run's plan beside what that counts, and of all together; [] on a CPU."""
    document = json.loads((run / "plan.json").read_text())
    rows = [MemoryRow(component=Component.PROCESS, **{key: row[key] for key in KEYS}) for row in document["memory"]]
    seen = watch.peaks_gib
    found: list[Record] = [
        {"gpu": gpu, "processes": names, "seen_gib": seen.get(int(gpu), 0.0), "planned_gib": on_gpu(rows, names) / GIB}
        for gpu, names in document["gpu_map"].items()
    ]
    if found:
        planned = sum(row["planned_gib"] for row in found)
        found.append({"gpu": "all", "processes": [], "seen_gib": watch.peak_gib, "planned_gib": planned})
    return [row | {"ratio": row["seen_gib"] / row["planned_gib"]} for row in found]


def as_planned(found: Sequence[Record]) -> bool:
    """Whether the layout holds what its plan counts, by `LIMIT`, and no GPU more. True where nothing was seen."""
    if not found or not found[-1]["seen_gib"]:
        return True
    return found[-1]["ratio"] >= 1 - LIMIT and all(row["ratio"] <= 1 + LIMIT for row in found)


def judge(args: argparse.Namespace, run: Path, wall_s: float) -> dict[str, Any]:
    """The figures of a run; JSON-able."""
    found = records(run)
    steps = trained(found)
    steady = [r for r in steps if args.skip <= r["step"] < args.steps]
    updates = [r for r in found if "pause_s" in r]
    later = [r for r in updates if r["step"] > args.skip]
    summary = json.loads((run / "summary.json").read_text())
    result: dict[str, Any] = {
        "shape": args.shape, "device": args.device, "layout": args.layout, "time_sharing": args.time_sharing,
        "steps": min(len(steps), args.steps), "wall_s": wall_s, "start_s": summary["phases_s"].get("start-up"),
        "first_steps_s": [round(r["step_s"], 2) for r in steps[: args.skip]],
        "restarts": sum(summary["restarts"].values()), "resyncs": sum(r["resyncs"] for r in updates),
        "notes": summary["notes"], "bottleneck": summary["bottleneck"],
        "peak_memory_bytes": summary["memory"].get("peak_bytes"),
    }  # fmt: skip
    if not steady:
        return result
    spent, waited = (sum(r[name] for r in steady) for name in ("step_s", "wait_s"))
    tokens = sum(r["tokens"] for r in steady)
    phases = {name: mean(steady, *parts) for name, parts in PHASES.items()}
    phases["other"] = mean(steady, "step_s") - sum(phases.values())
    generated = sum(r["rollout_tokens_per_s"] * r["interval_s"] for r in later)
    parity = [r["parity_mean_abs"] for r in steady if "parity_mean_abs" in r]  # of steps with tokens that are not stale
    deltas = [r["delta_bytes"] for r in steady if r.get("delta_bytes")]
    return result | {
        "phases_s": phases | {"step": mean(steady, "step_s")}, "tokens_per_step": tokens / len(steady),
        "trained_tokens_per_s": tokens / spent, "trained_tokens_per_s_at_work": tokens / max(1e-9, spent - waited),
        "generated_tokens_per_s": generated / sum(r["interval_s"] for r in later) if later else None,
        "wait_share": waited / spent,
        "idle_share": sum(r["idle_s"] for r in later) / sum(r["interval_s"] for r in later) if later else None,
        "staleness_mean": mean(steady, "staleness_mean"), "parity_mean": statistics.fmean(parity) if parity else None,
        "full_bytes": statistics.median(r["full_bytes"] for r in steady),
        "delta_bytes": statistics.fmean(deltas) if deltas else None, "density": mean(steady, "delta_density"),
        "update": {name: s for name in UPDATE if (s := of_all(later, name))},
        "turn": {name: s for name in TURN if (s := of_all(found, name))},
    }  # fmt: skip


def main() -> None:
    parser = options(
        __doc__, shape={"4b": "as bench/random_checkpoint.py knows it"}, device=("cuda", "cpu"), layout=LAYOUTS,
        time_sharing={False: "of a shared layout on GPUs"}, steps=20, skip=3, groups={8: "of 8 samples, a step"},
        new_tokens={int: "default 512; 24 of the tiny shape"}, limit_s=540.0, model={str: "a checkpoint of the shape"},
        running={128: "requests that the engine decodes at once"}, set="changes the recipe",
        folder={str: "where checkpoint and run lie; default a temporary one"},
        engine_path={str: "PYTHONPATH of the environment that holds SGLang"},
    )  # fmt: skip
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or (24 if args.shape == "tiny" else 512)
    if args.steps <= args.skip:
        parser.error(f"--steps must be over --skip ({args.skip})")
    if args.time_sharing and (args.device == "cpu" or args.layout == "1+1"):
        parser.error(
            "--time-sharing needs GPUs that engine and trainer share: --layout shared or 1+2, not --device cpu"
        )
    with folder(args.folder) as name:
        run, model = name / "run", checkpoint(args, name)
        begun = time.monotonic()
        with watched(args.device) as watch:
            code, said = train(args, model, run)
        if code not in (0, 130):
            logs = [f"==> {log.name}\n{log.read_text()[-1500:]}" for log in sorted(run.glob("logs/attempt_1/*.log"))]
            print("\n".join([f"`astra train` ended with {code}:", said, *logs]), file=sys.stderr)
        if not (run / "summary.json").exists():
            sys.exit(1)
        seen = memory(run, watch)
        result = judge(args, run, time.monotonic() - begun) | {"memory": seen, "as_planned": as_planned(seen)}
        fallen = waterfall.of_run(run, skip=args.skip)
        result |= {name: fallen[name] for name in ("waterfall", "engines")}
    show(args, result)
    whole = code in (0, 130) and result["steps"] == args.steps
    sys.exit(0 if whole and not result["restarts"] and not result["resyncs"] and result["as_planned"] else 1)


if __name__ == "__main__":
    main()
