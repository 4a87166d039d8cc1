"""What several training GPUs bring: tokens/s and MFU of one rank, and of N for every `train.sharding`.

    python bench/trainer/ranks.py [--ranks 2] [--ways optimizer parameters ...] [--micro-batches 8] [--steps 3] [--json]
    python bench/trainer/ranks.py --shape tiny --tokens 256 --micro-batches 8 --steps 1         on a CPU, over gloo

The trainer, its samples and the figures are those of `bench/trainer/speed.py` (variant `--variant`, one minibatch of
`--micro-batches` of all ranks together). One rank runs first, then all ways one after the other in the same N
processes, each of which sees one GPU. `times` is the rate over that of one rank; `planned_times` what the plan's
estimate gives for these GPUs. Every rank prints its peak memory; `peak_gib` is the largest. The gradient norms must be
equal but for rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from astracli.config.recipe_train import Sharding
from astracli.machine import read
from astracli.plan import cost
from astracli.plan.cost import TrainerLoad
from astracli.process.layout import Split
from astracli.process.ports import free_ports

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import machine, say, show

from trainer.case import VARIANTS, Case, case_options
from trainer.speed import measure, release

FIGURES = ("tokens_per_s", "mfu", "peak_gib", "planned_gib", "grad_norm", "warm_up_s", "micro_batches")


def child(args: Any) -> None:
    """One rank: a line of JSON for each way."""
    case = Case(args)
    ranks = case.ranks.world_size
    peak = next((float(tflops) for part, tflops in cost.PEAK.items() if part in machine()["machine"]), None)
    ways: list[Any] = args.ways if ranks > 1 else ["full"]
    for way in ways:
        case.ranks.sharding = way
        split = Split(sharding=way)
        variant = replace(VARIANTS[args.variant], split=split)
        try:
            found = measure(case.trainer(variant), case.groups, args.steps, case.shape, peak, split)
            row = {name: found[name] for name in FIGURES}
            row["mfu"] = row["mfu"] / ranks if row["mfu"] else None
        except torch.OutOfMemoryError as problem:
            row = {"raised": str(problem)[:200]}
        case.ranks.barrier()
        release()
        print(json.dumps({"way": way, "rank": case.ranks.rank} | row), flush=True)
    case.ranks.close()


def run(ranks: int) -> list[list[dict[str, Any]]]:
    """The lines of every rank."""
    (port,) = free_ports(1, "127.0.0.1")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks)))).split(",")
    together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--child"],
            env=os.environ | together | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": (visible * ranks)[rank]},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in children]
    if any(process.returncode for process in children):
        sys.exit(f"a rank ended with {[process.returncode for process in children]}")
    return [[json.loads(line) for line in text.splitlines() if line.startswith('{"way"')] for text in outputs]


def planned_times(args: Any, case_shape: Any, recipe: Any, ways: list[Any]) -> dict[str, float]:
    """What the plan expects a step to be shortened by; {} without a GPU."""
    found, _ = read.gpus()
    if not found:
        return {}
    pace = cost.pace(found[: args.ranks], read.peer_link())
    tokens = args.micro_batches * args.tokens
    sequences = recipe.rollout.context_length * cost.TYPICAL
    groups = max(1, round(tokens / sequences / recipe.rollout.group_size))
    load = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_groups": groups})})
    alone = TrainerLoad(load, case_shape, 1, pace).step_seconds(Split())
    several = TrainerLoad(load, case_shape, args.ranks, pace)
    return {way: alone / several.step_seconds(Split(sharding=way)) for way in ways}


def main() -> None:
    parser = case_options(__doc__, ranks=2, steps={3: "timed"}, child={False: "one rank: for this script itself"})
    parser.add_argument("--ways", nargs="+", choices=get_args(Sharding), default=list(get_args(Sharding)))
    parser.add_argument("--variant", choices=VARIANTS, default="packed-none")
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    from astracli.models import registry
    from trainer.case import recipe, shape_config

    began = time.perf_counter()
    adapter = registry.get(args.adapter)
    shape = adapter.memory_shape(shape_config(adapter, args.shape))
    expected = planned_times(args, shape, recipe(VARIANTS[args.variant], args.tokens, 8), args.ways)
    ((alone,),) = run(1)
    say(alone)
    rows = [alone | {"ranks": 1, "way": "one rank", "times": 1.0}]
    for lines in zip(*run(args.ranks), strict=True):
        row = lines[0] | {"ranks": args.ranks}
        if "raised" not in row and "raised" not in alone:
            row |= {"times": row["tokens_per_s"] / alone["tokens_per_s"], "planned_times": expected.get(row["way"])}
        peaks = [line["peak_gib"] for line in lines if line.get("peak_gib")]
        row |= {"peak_gib": max(peaks, default=None)}
        rows.append(row)
        say(row)
    for row in rows:
        row.pop("rank")
    show(args, {"rows": rows, "took_s": time.perf_counter() - began})


if __name__ == "__main__":
    main()
