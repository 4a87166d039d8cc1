"""What goes on beside training and what it costs a step: a version that is published, a checkpoint that is written.

    python bench/trainer/beside.py publish [--shape 4b] [--variant packed-selective] [--pairs 8] [--json]
    python bench/trainer/beside.py checkpoint [--shape 4b] [--directory DIR] [--checkpoints 3] [--json]
    either with --shape tiny                    on a CPU

The trainer is that of speed.py (random weights, real optimizer); publisher and checkpoint are the product's, with their
threads. Steps go to stderr as they end. --limit-s counts from the end of the first step that warms up, which with an
empty kernel cache takes two minutes; two pairs, or one checkpoint, are measured in any case.

`publish`: a step *on* begins as the worker does it: the snapshot of all weights in their wire dtypes is taken, and
while the step trains, it is digested, compared with the version before, coded and written. A step *off* is the same
batch without. Which of the two comes first changes from pair to pair; between steps the publisher is waited for,
outside the clock, and `publish_s` says how long it took. The batches are those of the steps that warm up, so that no
timed step compiles a kernel for a shape that is new. Wanted: a ratio of at most 1.02.

`checkpoint`: all steps have the same batch. For each checkpoint there are two steps without (`off_s`), the step that
begins with handing it over and waits for the copy before its update (`first_s`), and those that pass while it is still
written (`beside_s`). `cost_s` is what all of these took longer than they would have without. A checkpoint of 4.2 B is
50 GB, and its copy in pinned host memory as much: the one before is removed before the next begins, and --directory
says where it goes (/dev/shm is host memory, too). Wanted: `first_s` and `beside_s` of at most 1.02 `off_s`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from astracli.rl.types import Group
from astracli.training import checkpoint
from astracli.training.checkpoint_saver import Saver
from astracli.training.loop import ENCODE_THREADS
from astracli.training.step import Trainer
from astracli.weights.publish.publisher import Publisher, PublishResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import folder, more_options, say, show

from trainer.case import VARIANTS, Case, case_options, settle

WARM_UP = 3
"""Steps that are not timed."""
OFF = 2
"""Steps without a checkpoint before each."""
MOST = 20
"""Steps beside one checkpoint that are timed."""


def timed(trainer: Trainer, sample: list[Group], number: int, begin: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step, and of what `begin` does in it before training."""
    device = trainer.ranks.device
    settle(device)
    began = time.perf_counter()
    begin()
    handed = time.perf_counter()
    trainer.train(sample, number, number)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # not the stream of what goes on beside
    return {"step_s": time.perf_counter() - began, "hand_over_s": handed - began}


@dataclass
class Publishing:
    """Steps with and without a version that is published beside them."""

    case: Case
    trainer: Trainer
    publisher: Publisher
    version: int = 0

    def step(self, sample: list[Group], number: int, *, on: bool) -> dict[str, Any]:
        copied = 0.0

        def begin() -> None:
            nonlocal copied
            began = time.perf_counter()
            tensors = self.trainer.masters.wire_shards()
            copied = time.perf_counter() - began
            self.publisher.publish_async(self.version, tensors, owned=True)

        self.version += on
        found: dict[str, Any] = timed(self.trainer, sample, number, begin if on else lambda: None)
        if on:
            found |= {"copy_s": copied, "hand_over_s": found["hand_over_s"] - copied} | published(self.publisher.wait())
        if self.trainer.ranks.device.type == "cuda":
            found["reserved_gib"] = torch.cuda.memory_reserved() / 2**30
        return found

    def measure(self, pairs: int, limit_s: float) -> list[dict[str, Any]]:
        self.publisher.publish(0, self.trainer.masters.wire_shards(), owned=True)
        samples = [self.case.groups(number) for number in range(WARM_UP)]
        until = math.inf
        for number, sample in enumerate(samples):  # kernels are compiled, and the base comes to where it stays
            begin = time.perf_counter()
            say({"warm_up": number, **self.step(sample, number, on=True)})
            last = time.perf_counter() - begin
            until = min(until, time.perf_counter() + limit_s)
        rows: list[dict[str, Any]] = []
        for pair in range(pairs):
            if pair >= 2 and time.perf_counter() + 2.5 * last > until:
                say(ends_after=f"{pair} pairs: more would not fit into --limit-s")
                break
            row: dict[str, Any] = {"pair": pair}
            begin = time.perf_counter()
            for on in (True, False) if pair % 2 else (False, True):
                found = self.step(samples[pair % WARM_UP], WARM_UP + pair, on=on)
                row["on_s" if on else "off_s"] = found.pop("step_s")
                row |= found if on else {}
            last = (time.perf_counter() - begin) / 2
            rows.append(row)
            say(row)
        return rows


def published(result: PublishResult | None) -> dict[str, Any]:
    assert result is not None
    return {"publish_s": result.publish_s, "density": result.density, "bytes": result.bytes_delta}


def publish(args: argparse.Namespace, case: Case, trainer: Trainer) -> dict[str, Any]:
    with folder(in_memory=True) as name:
        threads = 1 if case.ranks.device.type == "cpu" else ENCODE_THREADS
        publisher = Publisher(name, full_interval=100_000, keep=4, tied=trainer.masters.tied, threads=threads)
        rows = Publishing(case, trainer, publisher).measure(args.pairs, args.limit_s)
        where = next(iter(publisher.base.values())).flat.device.type
        publisher.close()
    found: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "pair"}
    found |= {"ratio": found["on_s"] / found["off_s"], "pairs": len(rows), "published_from": where}
    return found | {"ratio_of_pairs": statistics.median(row["on_s"] / row["off_s"] for row in rows), "rows": rows}


@dataclass
class Checkpointing:
    """Steps before, at the begin of and beside checkpoints, on one batch."""

    trainer: Trainer
    saver: Saver
    sample: list[Group]
    number: int = 0

    def step(self, kind: str, begin: Callable[[], None] = lambda: None) -> float:
        found = timed(self.trainer, self.sample, self.number, begin)
        self.number += 1
        say({"step": kind, **found})
        return found["step_s"]

    def checkpoint(self, number: int) -> dict[str, Any]:
        """One checkpoint and the steps around it."""
        shutil.rmtree(checkpoint.place(self.saver.directory, number - 1), ignore_errors=True)
        off = [self.step("off") for _ in range(OFF)]
        first = self.step("first", lambda: self.saver.begin(number, self.trainer.masters))
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
        say(row)
        return row

    def measure(self, checkpoints: int, limit_s: float) -> list[dict[str, Any]]:
        until = math.inf
        for _ in range(WARM_UP):
            self.step("warm-up")
            until = min(until, time.perf_counter() + limit_s)
        rows: list[dict[str, Any]] = []
        last = 0.0
        for number in range(1, checkpoints + 1):
            if rows and time.perf_counter() + 1.2 * last > until:
                say(ends_after=f"{len(rows)} checkpoints: more would not fit into --limit-s")
                break
            began = time.perf_counter()
            rows.append(self.checkpoint(number))
            last = time.perf_counter() - began
        return rows


def checkpoints(args: argparse.Namespace, case: Case, trainer: Trainer) -> dict[str, Any]:
    with folder(args.directory) as name:
        saver = Saver(name, case.ranks, keep=1)
        began = time.perf_counter()
        held = saver.prepare(trainer.masters)
        held.wait()
        memory = {"memory_s": time.perf_counter() - began, "memory_gb": sum(b.nbytes for b in held.blocks) / 1e9}
        say(memory)
        rows = Checkpointing(trainer, saver, case.groups(0)).measure(args.checkpoints, args.limit_s)
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    found: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in keys} | memory
    found |= {
        f"ratio_{name}": found[f"{name}_s"] / found["off_s"] for name in ("first", "beside") if f"{name}_s" in found
    }
    return found | {"checkpoints": len(rows), "cost_of_a_step": found["cost_s"] / found["off_s"], "rows": rows}


def main() -> None:
    parser = case_options(__doc__, variant=("packed-selective", *VARIANTS), limit_s=120.0)
    parser.add_argument("what", choices=["publish", "checkpoint"])
    more_options(parser, pairs={8: "of steps, at least 1"}, checkpoints={3: "at least 1"},
                 directory={Path: "where checkpoints go; default: the temporary one"})  # fmt: skip
    args = parser.parse_args()
    case = Case(args)
    trainer = case.trainer(VARIANTS[args.variant])
    show(args, (publish if args.what == "publish" else checkpoints)(args, case, trainer))
    case.ranks.close()


if __name__ == "__main__":
    main()
