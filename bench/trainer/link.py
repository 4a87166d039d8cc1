"""What a GPU's link to pinned host memory carries, and what splitting and joining master weights costs.

    python bench/trainer/link.py [--gib 1] [--rounds 5] [--json]

Copies to the GPU, from it, and both at once (bytes of both directions together), whole and in pieces of 64 MiB, as
moments pass through in an update (`training/overlapped_offload.py`); then the kernels of `training/split_masters.py`
by the bytes that they read and write (8 a parameter). Medians, GB/s. `astracli/plan/cost.py` uses the figure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from astracli.training import split_masters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import median_s, options, show

PIECE = 2**26


def main() -> None:
    args = options(__doc__, gib={1.0: "in each direction"}, rounds=5).parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    size = max(PIECE, int(args.gib * 2**30) // PIECE * PIECE)
    there = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    here = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copy(way: int, piece: int) -> None:
        source, target = (here[0], there[0]) if way == 0 else (there[1], here[1])
        with torch.cuda.stream(streams[way]):
            for start in range(0, size, piece):
                target[start : start + piece].copy_(source[start : start + piece], non_blocking=True)

    def both(piece: int) -> None:
        for start in range(2):
            copy(start, piece)

    elements = size // 4
    master = torch.randn(elements, device="cuda")
    high, rest = (torch.empty(elements, dtype=kind, device="cuda") for kind in (torch.bfloat16, torch.int16))
    cases: dict[str, tuple[Callable[[], None], int]] = {
        "to the GPU": (lambda: copy(0, size), size), "from the GPU": (lambda: copy(1, size), size),
        "both at once": (lambda: both(size), 2 * size), "both at once, 64 MiB pieces": (lambda: both(PIECE), 2 * size),
        "split masters": (lambda: split_masters.split(master, high, rest), 8 * elements),
        "join masters": (lambda: split_masters.join(high, rest, master), 8 * elements),
    }  # fmt: skip
    found = {name: moved / median_s(work, args.rounds) / 1e9 for name, (work, moved) in cases.items()}
    show(args, {"gb_per_s": found})


if __name__ == "__main__":
    main()
