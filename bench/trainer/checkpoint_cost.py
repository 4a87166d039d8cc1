"""What a checkpoint that is written beside training costs a step: steps with and without one, on the same batch.

    python bench/trainer/checkpoint_cost.py [--shape 4b] [--directory DIR] [--checkpoints 3] [--limit-s 120] [--json]
    python bench/trainer/checkpoint_cost.py --shape tiny                 on a CPU

The trainer is that of speed.py (random weights, real optimizer), the checkpoint the product's: copied to pinned
memory, hashed and written while training goes on. For each checkpoint there are two steps without (`off_s`), the step
that begins with handing it over and waits for the copy before its update (`first_s`), and those that pass while it is
still written (`beside_s`). `cost_s` is what all of these took longer than they would have without. A checkpoint of
4.2 B is 50 GB, and its copy in host memory as much: the one before is removed before the next begins, and --directory
says where it goes (/dev/shm is host memory, too). --limit-s counts from the end of the first warm-up step, which with
an empty kernel cache takes two minutes; one checkpoint is measured in any case. Wanted: `first_s` and `beside_s` of at
most 1.02 `off_s`. Steps go to stderr as they end.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from astracli.models import registry
from astracli.training import checkpoint
from astracli.training.checkpoint_saver import Saver
from astracli.training.step import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer.case import VARIANTS, build, groups, join, recipe, settle, shape_config
from trainer.speed import environment

WARM_UP = 3
"""Steps that are not timed."""
OFF = 2
"""Steps without a checkpoint before each."""
MOST = 20
"""Steps beside one checkpoint that are timed."""


class Bench:
    def __init__(self, trainer: Trainer, saver: Saver, sample: Any):
        self.trainer, self.saver, self.sample = trainer, saver, sample
        self.number = 0

    def step(self, kind: str, checkpoint_step: int | None = None) -> float:
        """Seconds of one step, and of what it does for a checkpoint."""
        device = self.trainer.ranks.device
        settle(device)
        began = time.perf_counter()
        if checkpoint_step is not None:
            self.saver.begin(checkpoint_step, checkpoint_step, self.trainer.masters)
        handed = time.perf_counter() - began
        self.trainer.train(self.sample, self.number, self.number)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # not the copy's stream
        took = time.perf_counter() - began
        self.number += 1
        told = {"step": kind, "step_s": took, **({"hand_over_s": handed} if checkpoint_step is not None else {})}
        print(json.dumps(told), file=sys.stderr, flush=True)
        return took

    def checkpoint(self, number: int) -> dict[str, Any]:
        """One checkpoint and the steps around it."""
        shutil.rmtree(checkpoint.place(self.saver.directory, number - 1), ignore_errors=True)
        off = [self.step("off") for _ in range(OFF)]
        first = self.step("first", number)
        beside: list[float] = []
        while self.saver.busy and len(beside) < MOST:
            took = self.step("beside")
            if self.saver.busy:  # else it was written during a part of that step only
                beside.append(took)
        self.saver.wait()
        written = self.saver.figures()
        usual = statistics.mean(off)
        row = {"off_s": usual, "first_s": first, "beside": len(beside), "copy_s": written["checkpoint_copy_s"]}
        row |= {"beside_s": statistics.mean(beside)} if beside else {}
        row |= {"cost_s": first + sum(beside) - usual * (1 + len(beside)), "write_s": written["checkpoint_write_s"]}
        gb = written["checkpoint_bytes"] / 1e9
        row |= {"gb": gb, "copy_gb_per_s": gb / row["copy_s"], "write_gb_per_s": gb / row["write_s"]}
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def measure(bench: Bench, checkpoints: int, limit_s: float) -> list[dict[str, Any]]:
    until = math.inf
    for _ in range(WARM_UP):
        bench.step("warm-up")
        until = min(until, time.perf_counter() + limit_s)
    rows: list[dict[str, Any]] = []
    last = 0.0
    for number in range(1, checkpoints + 1):
        if rows and time.perf_counter() + 1.2 * last > until:
            print(f"ends after {len(rows)} checkpoints: more would not fit into --limit-s", file=sys.stderr, flush=True)
            break
        began = time.perf_counter()
        rows.append(bench.checkpoint(number))
        last = time.perf_counter() - began
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="qwen3_5")
    parser.add_argument("--shape", default="4b", help="`tiny`, or the end of a model id that the adapter knows")
    parser.add_argument("--variant", choices=VARIANTS, default="packed-selective")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of one step, about")
    parser.add_argument("--longest", type=int, default=4000, help="longest completion, tokens")
    parser.add_argument("--directory", type=Path, default=None, help="where checkpoints go; default: the temporary one")
    parser.add_argument("--checkpoints", type=int, default=3, help="at least 1")
    parser.add_argument("--limit-s", type=float, default=120.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ranks = join()
    adapter, variant = registry.get(args.adapter), VARIANTS[args.variant]
    config = shape_config(adapter, args.shape)
    vocabulary = adapter.memory_shape(config).vocab_size
    size = 4 if args.shape == "tiny" else 8
    trainer = build(adapter, config, variant, recipe(variant, args.tokens, size), ranks)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        saver = Saver(Path(folder), ranks, keep=1)
        began = time.perf_counter()
        saver.prepare(trainer.masters)
        saver.prepared()
        memory = {"memory_s": time.perf_counter() - began, "memory_gb": sum(b.nbytes for b in saver.blocks) / 1e9}
        print(json.dumps(memory), file=sys.stderr, flush=True)
        sample = groups(args.micro_batches * args.tokens, args.longest, vocabulary, 0, size)
        rows = measure(Bench(trainer, saver, sample), args.checkpoints, args.limit_s)
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    found: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in keys} | memory
    found |= {"checkpoints": len(rows), "ratio_first": found["first_s"] / found["off_s"]}
    found |= {"ratio_beside": found["beside_s"] / found["off_s"]} if "beside_s" in found else {}
    found |= {"cost_of_a_step": found["cost_s"] / found["off_s"]}
    if args.json:
        print(json.dumps({**found, "rows": rows, "environment": environment(ranks.device)}))
    else:
        print("  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    ranks.close()


if __name__ == "__main__":
    main()
