"""The whole loop at 4.2 B parameters: `astra train` for 20 steps that nobody touches, and where its seconds go.

    python bench/gpu_loop.py [--layout 1+1 | shared | 1+2] [--time-sharing] [--steps 20] [--engine-path PATH] [--json]
    python bench/gpu_loop.py --shape tiny --device cpu [--layout 1+2]          a laptop, the embedded engine

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
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meter import MemoryWatch

from astracli.plan.memory import MemoryRow, on_gpu

HERE = Path(__file__).parent
LAYOUTS = ("1+1", "shared", "1+2")
PHASES = {
    "wait": ("wait_s",),
    "batch and checks": ("batch_s", "check_s"),
    "score": ("score_s",),
    "forward": ("forward_s",),
    "backward": ("backward_s",),
    "optimizer": ("optimizer_s",),
    "publish": ("publish_s",),
}
"""Of a trainer's step; what is left of `step_s` is shown as `other`."""
UPDATE = ("fetch_s", "transfer_s", "stage_s", "pause_s", "apply_s", "verify_s", "gap_s", "readback_s")
TIME_SHARING = ("release_s", "away_s", "resume_s")
GIB = 2**30
LIMIT = 0.1
"""By how much of the plan the memory that is seen may differ from it."""

Record = dict[str, Any]


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
        names = ("resources.rollout_gpus", "resources.train_gpus", "resources.share_gpus")
        values |= dict(zip(names, gpus, strict=True))
        if args.time_sharing:
            values["resources.share_mode"] = "time_sharing"
        if args.engine_path:
            values["resources.engine.env.PYTHONPATH"] = args.engine_path
    else:
        values |= dict.fromkeys(("resources.rollout_gpus", "resources.train_gpus"), 0)
        values |= {"resources.share_gpus": False, "resources.train_ranks": gpus[1]}
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()] + args.set


def checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    if args.model:
        return Path(args.model).resolve()
    out = folder / f"random-{args.shape}"
    command = [sys.executable, str(HERE / "random_checkpoint.py"), str(out), "--shape", args.shape]
    subprocess.run([*command, "--device", args.device], check=True, stdout=sys.stderr)
    return out


def train(args: argparse.Namespace, model: Path, run: Path) -> tuple[int, str]:
    """(exit code, last lines) of the run, which is interrupted when it has come far enough or the time is over."""
    command = [sys.executable, "-m", "astracli", "train", "--recipe", str(HERE / "random-4b.toml")]
    command += ["--run-dir", str(run), *(part for value in settings(args, model) for part in ("--set", value))]
    begun, said = time.monotonic(), -1
    with (run.parent / "train.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=run.parent, stdout=log, stderr=log)
        while process.poll() is None:
            found = records(run)
            trained = len(steps_of(found))
            if trained != said:
                said = trained
                print(f"{time.monotonic() - begun:6.1f} s: {trained} steps", file=sys.stderr, flush=True)
            served = max((r["step"] for r in found if "pause_s" in r), default=0)
            if served >= args.steps or time.monotonic() - begun > args.limit_s:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.25)
        code = process.wait()
        log.seek(0)
        return code, log.read()[-3000:]


def records(run: Path) -> list[Record]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last line, half written
    return found


def steps_of(found: Sequence[Record]) -> list[Record]:
    return [r for r in found if r["process"] == "trainer" and "step_s" in r]


def mean(rows: Sequence[Record], *names: str) -> float:
    return statistics.fmean(sum(r.get(name) or 0.0 for name in names) for r in rows)


def spread(rows: Sequence[Record], name: str) -> dict[str, float] | None:
    """p50, p99 (of few values the largest) and how many."""
    values = sorted(float(r[name]) for r in rows if isinstance(r.get(name), int | float))
    if not values:
        return None
    return {"p50": statistics.median(values), "p99": values[min(len(values) - 1, int(0.99 * len(values)))],
            "count": len(values)}  # fmt: skip


def memory(run: Path, watch: MemoryWatch) -> list[Record]:
    """What was seen of each GPU of the run's plan beside what that counts, and of all together; [] on a CPU."""
    document = json.loads((run / "plan.json").read_text())
    rows = [MemoryRow(**row) for row in document["memory"]]
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
    trained = steps_of(found)
    steady = [r for r in trained if args.skip <= r["step"] < args.steps]
    updates = [r for r in found if "pause_s" in r]
    later = [r for r in updates if r["step"] > args.skip]
    summary = json.loads((run / "summary.json").read_text())
    result: dict[str, Any] = {
        "shape": args.shape, "device": args.device, "layout": args.layout, "time_sharing": args.time_sharing,
        "steps": min(len(trained), args.steps), "wall_s": wall_s, "start_s": summary["phases_s"].get("start-up"),
        "first_steps_s": [round(r["step_s"], 2) for r in trained[: args.skip]],
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
        "phases_s": phases | {"step": mean(steady, "step_s")},
        "tokens_per_step": tokens / len(steady),
        "trained_tokens_per_s": tokens / spent,
        "trained_tokens_per_s_at_work": tokens / max(1e-9, spent - waited),
        "generated_tokens_per_s": generated / sum(r["interval_s"] for r in later) if later else None,
        "wait_share": waited / spent,
        "idle_share": sum(r["idle_s"] for r in later) / sum(r["interval_s"] for r in later) if later else None,
        "staleness_mean": mean(steady, "staleness_mean"),
        "parity_mean": statistics.fmean(parity) if parity else None,
        "full_bytes": statistics.median(r["full_bytes"] for r in steady),
        "delta_bytes": statistics.fmean(deltas) if deltas else None,
        "density": mean(steady, "delta_density"),
        "update": {name: s for name in UPDATE if (s := spread(later, name))},
        "time_sharing": {name: s for name in TIME_SHARING if (s := spread(found, name))},
    }


def table(result: dict[str, Any]) -> None:
    shared = ", time-shared" if result["time_sharing"] else ""
    what = f"{result['shape']} on {result['device']}, layout {result['layout']}{shared}"
    first = ", ".join(f"{s:g}" for s in result["first_steps_s"])
    print(f"{what}: {result['steps']} steps in {result['wall_s']:.0f} s of wall time (start-up {result['start_s']} s; "
          f"the first steps, left out below, took {first} s)")  # fmt: skip
    print(f"restarts {result['restarts']}, resyncs {result['resyncs']:g}" + "".join(f"; {n}" for n in result["notes"]))
    memory_table(result["memory"])
    if "phases_s" not in result:
        return
    print("\n| phase | s a step | share |\n|---|---|---|")
    step = result["phases_s"]["step"]
    for name, seconds in result["phases_s"].items():
        print(f"| {name} | {seconds:.3f} | {seconds / step:.1%} |")
    at_work, generated = result["trained_tokens_per_s_at_work"], result["generated_tokens_per_s"] or 0
    print(
        f"\ntrainer {result['trained_tokens_per_s']:.0f} tokens/s ({at_work:.0f} while at work), "
        f"{result['tokens_per_step']:.0f} a step; generated {generated:.0f} tokens/s"
    )
    idle, delta = result["idle_share"], result["delta_bytes"]
    print(
        f"the trainer waited {result['wait_share']:.1%} of the time, the engine was idle "
        f"{'?' if idle is None else f'{idle:.1%}'}; mean staleness {result['staleness_mean']:.2f} versions"
    )
    print(
        f"full {result['full_bytes'] / 1e6:.3g} MB, mean delta {'-' if delta is None else f'{delta / 1e6:.3g} MB'}, "
        f"density {result['density']:.2%}"
        + (f"; parity mean {result['parity_mean']:.1e}" if result["parity_mean"] is not None else "")
    )
    for title in ("update", "time_sharing"):
        for name, s in result[title].items():
            print(f"{title} {name[:-2]}: p50 {1e3 * s['p50']:.1f} ms, p99 {1e3 * s['p99']:.1f} ms ({s['count']})")
    if result["bottleneck"]:
        print(f"summary table: {result['bottleneck']['words']}; try {result['bottleneck']['change'] or 'nothing else'}")


def memory_table(found: Sequence[Record]) -> None:
    if not found:
        return
    print("\n| GPU | processes | seen, GiB at most | planned GiB | seen / planned |\n|---|---|---|---|---|")
    for row in found:
        names = ", ".join(row["processes"]) or "at one time"
        figures = f"{row['seen_gib']:.1f} | {row['planned_gib']:.1f} | {row['ratio']:.3f}"
        print(f"| {row['gpu']} | {names} | {figures} |")
    print(f"the plan {'holds' if as_planned(found) else 'is missed'}: {LIMIT:.0%} is the limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4b", help="as bench/random_checkpoint.py knows it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layout", choices=LAYOUTS, default="1+1")
    parser.add_argument("--time-sharing", action="store_true", help="of a shared layout on GPUs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8, help="of 8 samples, a step")
    parser.add_argument("--new-tokens", type=int, help="default 512; 24 of the tiny shape")
    parser.add_argument("--running", type=int, default=128, help="requests that the engine decodes at once")
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--model", help="a checkpoint of the shape")
    parser.add_argument("--folder", help="where checkpoint and run lie; default a temporary one")
    parser.add_argument("--engine-path", help="PYTHONPATH of the environment that holds SGLang")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or (24 if args.shape == "tiny" else 512)
    if args.steps <= args.skip:
        parser.error(f"--steps must be over --skip ({args.skip})")
    if args.time_sharing and (args.device == "cpu" or args.layout == "1+1"):
        parser.error(
            "--time-sharing needs GPUs that engine and trainer share: --layout shared or 1+2, not --device cpu"
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        run = Path(name) / "run"
        model = checkpoint(args, Path(name))
        begun, watch = time.monotonic(), MemoryWatch()
        if args.device == "cuda":
            watch.start()
        code, said = train(args, model, run)
        watch.done.set()
        if code not in (0, 130):
            logs = [f"==> {log.name}\n{log.read_text()[-1500:]}" for log in sorted(run.glob("logs/attempt_1/*.log"))]
            print("\n".join([f"`astra train` ended with {code}:", said, *logs]), file=sys.stderr)
        if not (run / "summary.json").exists():
            sys.exit(1)
        result = judge(args, run, time.monotonic() - begun) | {"memory": memory(run, watch)}
    print(json.dumps(result)) if args.json else table(result)
    whole = code in (0, 130) and result["steps"] == args.steps
    sys.exit(0 if whole and not result["restarts"] and not result["resyncs"] and as_planned(result["memory"]) else 1)


if __name__ == "__main__":
    main()
