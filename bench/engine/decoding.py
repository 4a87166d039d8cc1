"""A decoding step of the embedded engine on a CPU: by the model family's own code, and by transformers' forward.

    python bench/engine/decoding.py [--rows 1 8 32 64 128 256] [--rounds 15] [--json]

The tiny recipe's model on one thread, with oneDNN or MKL as this machine decides (`kernels/cpu/linear.py`). Both sides
take turns, step by step, so that other work on the machine meets both alike. Milliseconds are CPU time, medians over
the rounds; `prompts` is reading so many prompts of 7 tokens, 8 samples each, with the step behind it.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import RECIPE, options, show

from astracli.kernels.cpu.memory import bound_memory

PROMPT, SAMPLES, NEW, SETTLED = 7, 8, 50, 3


def engine(*, own: bool, slots: int) -> Any:
    from astracli.config.recipe_io import load
    from astracli.data.fetch import bundled
    from astracli.engines.embedded.engine import EmbeddedEngine
    from astracli.engines.embedded.process import loader
    from astracli.models import registry

    recipe = load(RECIPE)
    path = bundled(recipe.model.path)
    adapter = registry.resolve(recipe, path)
    decoding = adapter.decoding if own else None
    return EmbeddedEngine(path, loader(adapter, "cpu"), slots=slots, context_length=64, decoding=decoding)


def step_ms(found: Any) -> float:
    began = time.process_time()
    assert found.scheduler.run_once()
    return 1000 * (time.process_time() - began)


def fill(found: Any, rows: int, seed: int) -> None:
    """So many rows, from prompts that differ by `seed`."""
    found.scheduler.abort()
    prompts = [[2 + (seed + 7 * i + j * j) % 29 for j in range(PROMPT)] for i in range(-(-rows // SAMPLES))]
    body = {
        "input_ids": [prompt for prompt in prompts for _ in range(SAMPLES)][:rows],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": NEW, "ignore_eos": True, "sampling_seed": seed},
    }
    found.generate(body, lambda place, completion: None)


def measure(sides: dict[str, Any], rows: int, rounds: int) -> dict[str, Any]:
    steps: dict[str, list[float]] = {name: [] for name in sides}
    prompts: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(3):
        for name, found in sides.items():
            fill(found, rows, seed)
            prompts[name].append(step_ms(found))
            for _ in range(SETTLED):
                step_ms(found)
        for _ in range(rounds):
            for name, found in sides.items():
                steps[name].append(step_ms(found))
    row: dict[str, Any] = {"rows": rows}
    row |= {f"step, {name}": statistics.median(found) for name, found in steps.items()}
    row |= {f"prompts, {name}": statistics.median(found) for name, found in prompts.items()}
    return row


def main() -> None:
    args = options(__doc__, rows=[1, 8, 32, 64, 128, 256], rounds=15).parse_args()
    bound_memory()
    import torch

    from astracli.kernels.cpu import linear

    torch.set_num_threads(1)
    sides = {"own": engine(own=True, slots=max(args.rows)), "transformers": engine(own=False, slots=max(args.rows))}
    rows = [measure(sides, count, args.rounds) for count in args.rows]
    show(args, {"onednn_over_mkl": linear.advantage(), "through_onednn": linear.chosen(), "cpu_ms": rows})


if __name__ == "__main__":
    main()
