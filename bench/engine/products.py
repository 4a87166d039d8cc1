"""Matrix products of ever other shapes: what oneDNN's compiled products take, and what keeping few of them costs.

    python bench/engine/products.py [--capacities 1024 256 64] [--rounds 4]

The linear layers of the tiny recipe's model on one thread: first as an engine calls them while its sequences end one
by one (256 rows down to 16), then as a trainer does (micro-batches of 32 samples, 20 to 45 tokens long, forward and
backward). A process for each part and capacity of the two caches (`kernels/cpu/memory.py`). Milliseconds are CPU time
of one pass.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import RECIPE, Record, options, show

CHILD = "--child"
PARTS = ("engine", "trainer")
ROWS = range(256, 15, -1)
LENGTHS = range(20, 46)
SAMPLES = 32


class Heap(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in ["arena", "a", "b", "c", "mapped", "d", "e", "used", "free", "f"]]


def used_mb() -> float:
    """Of the heap, what is allocated."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Heap
    return float(ask().used) / 1e6


def child(part: str, rounds: int) -> None:
    """Print [milliseconds, megabytes] of one part, in an environment that has the capacities."""
    from astracli.config.recipe_io import load
    from astracli.data.fetch import bundled
    from astracli.kernels.cpu import linear, memory
    from astracli.models import registry

    memory.bound_memory()
    import torch

    torch.set_num_threads(1)
    recipe = load(RECIPE)
    path = bundled(recipe.model.path)
    model = registry.resolve(recipe, path).load_for_serving(path, attention="sdpa")
    weights = [m.weight for m in model.modules() if type(m) is torch.nn.Linear and m.bias is None]
    x = {w.shape[1]: torch.randn(SAMPLES * max(LENGTHS), w.shape[1], requires_grad=True) for w in weights}

    def decode(rows: int) -> None:
        with torch.inference_mode():
            for weight in weights:
                linear.linear(x[weight.shape[1]][:rows], weight)

    def train(length: int) -> None:
        for weight in weights:
            linear.linear(x[weight.shape[1]][: SAMPLES * length], weight).sum().backward()

    before = used_mb()
    work, shapes = {"engine": (decode, ROWS), "trainer": (train, LENGTHS)}[part]
    milliseconds = timed(work, shapes, rounds)
    print(json.dumps([round(milliseconds, 2), round(used_mb() - before, 1)]))


def timed(work: Callable[[int], None], shapes: Iterable[int], rounds: int) -> float:
    """CPU milliseconds of a call, over all shapes in turn, behind a first round."""
    seconds = 0.0
    for round_ in range(rounds + 1):
        began = time.process_time()
        for shape in shapes:
            work(shape)
        seconds += (time.process_time() - began) if round_ else 0.0
    return 1000 * seconds / rounds / len(list(shapes))


def main() -> None:
    parser = options(__doc__, capacities=[1024, 256, 64], rounds=4)
    parser.add_argument(CHILD, choices=PARTS, help="one part, in this process")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.rounds)
        return
    from astracli.kernels.cpu.memory import CAPACITIES

    rows = []
    for capacity in args.capacities:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **dict.fromkeys(CAPACITIES, str(capacity))}
        row: Record = {"capacity": capacity}
        for part in PARTS:
            words = [sys.executable, __file__, CHILD, part, "--rounds", str(args.rounds)]
            done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
            row[f"{part}_ms"], row[f"{part}_mb"] = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
    show(args, {"products": rows})


if __name__ == "__main__":
    main()
