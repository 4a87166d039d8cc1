"""A real pretrained model learns: a shipped recipe run whole, and what its run shows.

    python bench/learning/real_models.py gsm8k --model ./q05 --data DATA --engine-path $EP --folder /tmp/real
    python bench/learning/real_models.py math --gguf .gpu/q15 --data DATA --engine-path $EP --folder /tmp/real
    python bench/learning/real_models.py --report /tmp/real/run [--out OUT]      of a run that goes on, or has ended
    python bench/learning/real_models.py gsm8k --device cpu --model TINY --data DATA --set train.steps=3 ...

`gsm8k` is qwen2.5-0.5b-gsm8k-m2po-delta, `math` qwen2.5-1.5b-math-m2po-delta; any other recipe goes by its name.
`--gguf` makes the checkpoint first (`scripts/make_gguf.py`). `--data` is a directory with `train` and `eval`
(docs/datasets.md); `math` makes `math_mix.jsonl` from its `deepscaler_sub` and `math_train`. The run lies in
FOLDER/run. Start this in the background where a command may not take as long as the run.

Printed: the evaluations with the share of unreadable answers, the first and the last one compared over paired items;
reward, density, bytes, pause, parity and seconds by phase of every `--every`-th step; shares of time and of space;
memory and descriptors of every process, memory of GPUs and size of the hub from step `--settled` on; the run's own
closing table. MFU is training's matrix products of all tokens in rows (prompts too) over the GPUs' dense bf16 peak,
while the trainer was at work: scoring counts as time alone. Exit 1 when the run did not end well, or an engine was
restarted or resynced.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from astracli.models.adapter import read_config
from astracli.plan.cost import peak

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ASTRA, Record, adapter_of, command, folder, gpu_settings, options, records, say, show, trained

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"gsm8k": "qwen2.5-0.5b-gsm8k-m2po-delta", "math": "qwen2.5-1.5b-math-m2po-delta"}
MIX = ("deepscaler_sub", "math_train")
PHASES = ("wait_s", "score_s", "forward_s", "backward_s", "optimizer_s", "publish_s", "checkpoint_s")
CURVE = (
    "reward_mean", "arrived_reward_mean", "completion_tokens_mean", "length_stop_fraction", "entropy", "kl",
    "grad_norm", "clip_fraction", "m2_limit", "staleness_mean", "parity_mean_abs",
)  # fmt: skip
KEPT = ("summary.json", "recipe.json", "plan.json", "machine.json", "metrics.jsonl", "report.html", "eval/eval.csv")
"""What `--out` gets of a run: all but its weights and samples."""


# ---- before the run


def checkpoint(args: argparse.Namespace, place: Path) -> Path:
    if args.model:
        return Path(args.model).resolve()
    out = place / "model"
    if not out.exists():
        words = [sys.executable, str(ROOT / "scripts" / "make_gguf.py"), str(out), "--from", str(args.gguf)]
        subprocess.run(words, check=True, stdout=sys.stderr)
    return out


def data_settings(args: argparse.Namespace, place: Path) -> Record:
    """Where the problems are: `--data` itself, or a directory of links into it beside the mixed training set."""
    if not args.data:
        return {}
    data = Path(args.data).resolve()
    if args.recipe != "math" or any((data / sub / "math_mix.jsonl").exists() for sub in ("", "train")):
        return {"data.path": data}
    own = place / "data"
    own.mkdir(exist_ok=True)
    if not (own / "eval").exists():
        (own / "eval").symlink_to(data / "eval")
    with (own / "math_mix.jsonl").open("wb") as mixed:
        for name in MIX:
            mixed.write((data / "train" / f"{name}.jsonl").read_bytes())
    return {"data.path": own}


def settings(args: argparse.Namespace, place: Path) -> list[str]:
    values: Record = {"model.path": checkpoint(args, place)} | data_settings(args, place)
    if args.device == "cuda":
        values |= gpu_settings(args, 1, shared=args.layout == "shared")
    else:
        values |= {"resources.device": "cpu", "resources.rollout_gpus": 0, "resources.train_gpus": 0}
    return [f"{key}={value}" for key, value in values.items()] + args.set


def train(args: argparse.Namespace, place: Path) -> int:
    """Exit code of the run in `place / "run"`; its words go to `train.log` beside it."""
    words = command("train", place / "run", settings(args, place), RECIPES.get(args.recipe, args.recipe))
    say(command=" ".join(words))
    with (place / "train.log").open("w") as log:
        return subprocess.run(words, cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode


# ---- what it shows


def mean(found: Iterable[Any]) -> float | None:
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    return statistics.fmean(numbers) if numbers else None


def evaluations(run: Path) -> list[Record]:
    file = run / "eval" / "eval.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        wanted = ("step", "benchmark", "n", "avg_at_n", "stderr", "k", "pass_at_k", "no_answer", "greedy")
        return [
            {name: row[name] for name in (*wanted, "greedy_no_answer")}
            for row in csv.DictReader(lines)
        ]  # fmt: skip


def by_step(steps: Sequence[Record], updates: Sequence[Record], every: int) -> tuple[list[Record], list[Record]]:
    """What is learned, and what a step costs, of every `every`-th step and the last."""
    pauses = {r["step"]: 1000 * r["pause_s"] for r in updates}
    shown = [r for r in steps if r["step"] % every == 0 or r is steps[-1]]
    learned = [{"step": r["step"]} | {name: r.get(name) for name in CURVE} for r in shown]
    costs = []
    for r in shown:
        phases = {name.removesuffix("_s"): r.get(name, 0.0) for name in PHASES}
        costs.append(
            {"step": r["step"], "step_s": r["step_s"], **phases}
            | {"other": r["step_s"] - sum(phases.values()), "tokens": r["tokens"], "density": r.get("delta_density")}
            | {"delta_mb": (r.get("delta_bytes") or 0) / 1e6, "pause_ms": pauses.get(r["step"] + 1)}
        )
    return learned, costs


def shares(run: Path, steps: Sequence[Record], updates: Sequence[Record]) -> Record:
    """Of time and space over all steps but the first, in which kernels are compiled."""
    steady, later = steps[1:], [r for r in updates if r["step"] > 1]
    if not steady:
        return {}
    spent, waited = (sum(r[name] for r in steady) for name in ("step_s", "wait_s"))
    tokens, interval = sum(r["tokens"] for r in steady), sum(r["interval_s"] for r in later)
    budget = json.loads((run / "recipe.json").read_text())["train"]["tokens_per_microbatch"]
    held = [r["row_tokens"] / (r["microbatches"] * budget) for r in steady if r.get("microbatches")]
    rows = sum(r.get("row_tokens", 0) for r in steady)
    result: Record = {
        "step_s": spent / len(steady),
        "tokens_per_step": tokens / len(steady), "row_tokens_per_step": rows / len(steady),
        "trained_tokens_per_s": tokens / spent, "trained_tokens_per_s_at_work": tokens / max(1e-9, spent - waited),
        "row_tokens_per_s_at_work": rows / max(1e-9, spent - waited), "mfu_at_work": mfu(run, rows, spent - waited),
        "trainer_wait_share": waited / spent, "microbatch_filled": mean(held),
    }  # fmt: skip
    wanted = ("packed_fraction", "delta_density", "delta_bytes", "full_bytes", "parity_mean_abs", "staleness_mean")
    result |= {name: mean(r.get(name) for r in steady) for name in wanted}
    if interval:
        weighted = {
            name: sum((r.get(name) or 0.0) * r["interval_s"] for r in later) / interval
            for name in ("slots_busy", "rollout_tokens_per_s")
        }
        result |= {
            "slots_busy": weighted["slots_busy"], "generated_tokens_per_s": weighted["rollout_tokens_per_s"],
            "engine_idle_share": sum(r["idle_s"] for r in later) / interval,
            "engine_idle_held_by_evaluation": sum(r["held_idle_s"] for r in later) / interval,
            "pause_ms_p50": statistics.median(1000 * r["pause_s"] for r in later),
            "pause_ms_max": max(1000 * r["pause_s"] for r in later),
        }  # fmt: skip
    return result


def mfu(run: Path, tokens: int, seconds: float) -> float | None:
    """Of the training GPUs; None on a CPU."""
    plan, machine = (json.loads((run / name).read_text()) for name in ("plan.json", "machine.json"))
    names = {gpu.get("index", i): gpu["name"] for i, gpu in enumerate(machine["gpus"])}
    own = [int(gpu) for gpu, held in plan["gpu_map"].items() if any(name.startswith("trainer") for name in held)]
    if not own or own[0] not in names:
        return None
    model = Path(json.loads((run / "recipe.json").read_text())["model"]["path"])
    shape = adapter_of(model).memory_shape(read_config(model))
    return float(shape.flops_per_token * tokens / (seconds * len(own) * peak(names[own[0]]) * 1e12))


def usage(found: Sequence[Record], settled: int) -> list[Record]:
    """Of each process and figure: at step 1, once it has settled, at the end, at most, and its growth in between."""
    rows = []
    for name in ("memory_bytes", "open_files", "hub_bytes"):
        for process in dict.fromkeys(r["of"] for r in found if name in r and "of" in r):
            values = {r["step"]: r[name] for r in found if r.get("of") == process and name in r}
            later = [values[step] for step in sorted(values) if step >= settled]
            if not later:
                continue
            first = values.get(1, later[0])
            grown = later[-1] / later[0] - 1 if later[0] else None
            rows.append(
                {"figure": name, "process": process, "step 1": first, f"step {settled}": later[0], "last": later[-1]}
                | {"most": max(values.values()), "grown": grown}
            )
    return rows


def said(words: Sequence[str], place: Path) -> list[str]:
    """What a command prints, by lines; its last words where it fails."""
    done = subprocess.run([*ASTRA, *words], cwd=place, capture_output=True, text=True)
    return (done.stdout if done.returncode == 0 else done.stderr[-500:]).splitlines()


def judge(run: Path, every: int, settled: int) -> Record:
    found = records(run)
    steps, updates = trained(found), [r for r in found if "pause_s" in r]
    evaluated = evaluations(run)
    result: Record = {"run": str(run), "steps": len(steps)}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        result |= {
            "state": summary["state"], "phases_s": summary["phases_s"], "restarts": sum(summary["restarts"].values()),
            "resyncs": sum(r["resyncs"] for r in updates), "bottleneck": summary.get("bottleneck"),
        }  # fmt: skip
    result["evaluations"] = evaluated
    if steps:
        result["learned"], result["costs"] = by_step(steps, updates, every)
        result["shares"] = shares(run, steps, updates)
    result["usage"] = usage(found, settled)
    at = sorted({int(row["step"]) for row in evaluated})
    if len(at) > 1:
        names = [f"{run}@{at[0]}", f"{run}@{at[-1]}"]
        result["paired"] = [{"line": line} for line in said(["eval", "--compare", *names], run.parent)]
        if any(row["greedy"] for row in evaluated):
            names = [f"{run}/eval/greedy@{at[0]}", f"{run}/eval/greedy@{at[-1]}"]
            result["paired_greedy"] = [{"line": line} for line in said(["eval", "--compare", *names], run.parent)]
    return result | {"closing": [{"line": line} for line in said(["runs", "report", str(run)], run.parent)]}


def keep(run: Path, out: Path) -> None:
    for name in KEPT:
        if (run / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, out / name)


def main() -> None:
    parser = options(
        __doc__, model={str: "a checkpoint"}, gguf={str: "a GGUF file, or the folder that holds its pieces"},
        data={str: "directory with train and eval"}, device=("cuda", "cpu"), layout=("1+1", "shared"),
        folder={str: "where model, data and run lie"}, engine_path={str: "PYTHONPATH of the environment with SGLang"},
        every={5: "shown steps"}, settled={20: "step from which memory should not grow"}, set="changes the recipe",
        report={str: "a run to report on, in the place of a new one"}, out={str: "gets the run's small files"},
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", help=f"{', '.join(RECIPES)} or the name of a recipe")
    args = parser.parse_args()
    if args.report is None and (args.recipe is None or not (args.model or args.gguf)):
        parser.error("name a recipe, and a model by --model or --gguf; or a run by --report")
    with folder(args.folder) if args.folder is None else _kept(Path(args.folder)) as place:
        code, began = 0, time.monotonic()
        run = Path(args.report).resolve() if args.report else place / "run"
        if args.report is None:
            code = train(args, place)
            say(ended=code, wall_s=round(time.monotonic() - began, 1))
            if code:
                print((place / "train.log").read_text()[-3000:], file=sys.stderr)
        result = judge(run, args.every, args.settled)
        if args.out:
            keep(run, Path(args.out))
    show(args, result)
    sys.exit(code or bool(result.get("restarts") or result.get("resyncs")))


def _kept(place: Path) -> Any:
    from contextlib import nullcontext

    place.mkdir(parents=True, exist_ok=True)
    return nullcontext(place.resolve())


if __name__ == "__main__":
    main()
