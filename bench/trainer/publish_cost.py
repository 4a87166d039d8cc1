"""What publishing in the background costs a training step: the same step with and without it, in turns.

    python bench/trainer/publish_cost.py [--shape 4b] [--variant packed-selective] [--pairs 8] [--limit-s 120] [--json]
    python bench/trainer/publish_cost.py --shape tiny                    on a CPU

The trainer is that of speed.py (random weights, real optimizer), the publisher the product's, with its threads. A
step *on* begins as the worker does it: the snapshot of all weights in their wire dtypes is taken, and while the step
trains, it is digested, compared with the version before, coded and written. A step *off* is the same batch without.
Which of the two comes first changes from pair to pair; between steps the publisher is waited for, outside the clock,
and `publish_s` says how long it took. The batches are those of the three steps that warm up, so that no timed step
compiles a kernel for a shape that is new. --limit-s counts from the end of the first of them, which with an empty
kernel cache takes two minutes; two pairs are measured in any case. Wanted: a ratio of at most 1.02. Steps go to stderr
as they end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from astracli.models import registry
from astracli.training.step import Trainer
from astracli.training.worker import ENCODE_THREADS
from astracli.weights.publish.publisher import Publisher, PublishResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer.case import VARIANTS, build, groups, join, recipe, settle, shape_config
from trainer.speed import environment

WARM_UP = 3
"""Steps that are not timed."""


def step(trainer: Trainer, sample: Any, number: int, publisher: Publisher | None, version: int) -> dict[str, float]:
    """Seconds of one step, of the copy at its beginning, and until the publisher has it."""
    device = trainer.ranks.device
    settle(device)
    began = time.perf_counter()
    copied = began
    if publisher is not None:
        tensors = trainer.masters.wire_shards()
        copied = time.perf_counter()
        publisher.publish_async(version, tensors, owned=True)
    handed = time.perf_counter()
    trainer.train(sample, number, number)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # not the publisher's stream
    ended = time.perf_counter()
    found = {"step_s": ended - began, "copy_s": copied - began, "hand_over_s": handed - copied}
    if device.type == "cuda":
        found["reserved_gib"] = torch.cuda.memory_reserved(device) / 2**30
    return found


def published(result: PublishResult | None) -> dict[str, Any]:
    assert result is not None
    return {"publish_s": result.publish_s, "density": result.density, "bytes": result.bytes_delta}


def measure(trainer: Trainer, publisher: Publisher, draw: Any, pairs: int, limit_s: float) -> list[dict[str, Any]]:
    publisher.publish(0, trainer.masters.wire_shards(), owned=True)
    version = 0
    samples = [draw(number) for number in range(WARM_UP)]
    until = math.inf
    for number, sample in enumerate(samples):  # kernels are compiled, versions 1 and 2 bring the base to where it stays
        version += 1
        begin = time.perf_counter()
        found = step(trainer, sample, number, publisher, version)
        told = published(publisher.wait())
        print(json.dumps({"warm_up": number, **found, **told}), file=sys.stderr, flush=True)
        last = time.perf_counter() - begin
        until = min(until, time.perf_counter() + limit_s)
    rows: list[dict[str, Any]] = []
    for pair in range(pairs):
        if pair >= 2 and time.perf_counter() + 2.5 * last > until:
            print(f"ends after {pair} pairs: more would not fit into --limit-s", file=sys.stderr, flush=True)
            break
        number, row = WARM_UP + pair, {"pair": pair}
        sample = samples[pair % WARM_UP]
        begin = time.perf_counter()
        for on in (True, False) if pair % 2 else (False, True):
            version += on
            found = step(trainer, sample, number, publisher if on else None, version)
            row["on_s" if on else "off_s"] = found["step_s"]
            if on:
                del found["step_s"]
                row |= found | published(publisher.wait())
        last = (time.perf_counter() - begin) / 2
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="qwen3_5")
    parser.add_argument("--shape", default="4b", help="`tiny`, or the end of a model id that the adapter knows")
    parser.add_argument("--variant", choices=VARIANTS, default="packed-selective")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of one step, about")
    parser.add_argument("--longest", type=int, default=4000, help="longest completion, tokens")
    parser.add_argument("--pairs", type=int, default=8, help="at least 1")
    parser.add_argument("--limit-s", type=float, default=120.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ranks = join()
    adapter, variant = registry.get(args.adapter), VARIANTS[args.variant]
    config = shape_config(adapter, args.shape)
    vocabulary = adapter.memory_shape(config).vocab_size
    size = 4 if args.shape == "tiny" else 8
    trainer = build(adapter, config, variant, recipe(variant, args.tokens, size), ranks)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        threads = 1 if ranks.device.type == "cpu" else ENCODE_THREADS
        publisher = Publisher(Path(folder), full_interval=100_000, keep=4, tied=trainer.masters.tied, threads=threads)

        def draw(number: int) -> Any:
            return groups(args.micro_batches * args.tokens, args.longest, vocabulary, number, size)

        rows = measure(trainer, publisher, draw, args.pairs, args.limit_s)
        where = next(iter(publisher._base.values())).flat.device.type
        publisher.close()
    found: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "pair"}
    found |= {"ratio": found["on_s"] / found["off_s"], "pairs": len(rows), "published_from": where}
    found |= {"ratio_of_pairs": statistics.median(row["on_s"] / row["off_s"] for row in rows)}
    if args.json:
        print(json.dumps({**found, "rows": rows, "environment": environment(ranks.device)}))
    else:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
            )
        )
    ranks.close()


if __name__ == "__main__":
    main()
