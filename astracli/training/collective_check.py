"""Do the ranks of a trainer reach each other? An all-reduce at their start, under a time limit.

On some machines NCCL's direct copies between GPUs hang or bring wrong data (PCIe access control, a virtual machine's
IOMMU), and a run would stand still in its first step. A rank whose sum does not come or is wrong ends with `BROKEN`.
Then the supervisor starts all ranks once more, in fresh processes, with `layout.WITHOUT_PEERS` in their environment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from astracli.process.layout import LIMIT_S

if TYPE_CHECKING:
    import torch

BROKEN = 71
"""Exit code of a rank whose all-reduce hung, failed or was wrong."""
ELEMENTS = {"cpu": 2**12, "cuda": 2**24}
"""fp32 elements: on GPUs enough that NCCL takes the path of a step."""


@contextmanager
def watched() -> Iterator[None]:
    """End this process with `BROKEN` when the block raises or has not ended in `LIMIT_S`: nothing can free a rank that
    hangs inside a collective."""
    timer = threading.Timer(LIMIT_S, _give_up, [f"the ranks' all-reduce has not ended after {LIMIT_S:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        _give_up(f"the ranks' all-reduce failed: {type(error).__name__}: {error}")
    finally:
        timer.cancel()


def check(rank: int, world_size: int, device: torch.device) -> float:
    """Sum over all ranks twice, the second time on what the first gave. Returns the bytes/s that the second moved from
    each rank to the next. Raises ValueError when a sum is wrong. Leaves no buffer behind in torch's cache, where an
    engine beside could not use it."""
    import torch
    import torch.distributed as dist

    buffer = torch.arange(ELEMENTS[device.type], device=device, dtype=torch.float32).remainder_(64.0)
    expected = buffer * (world_size * world_size) + world_size * sum(range(world_size))
    buffer += rank
    for _ in range(2):
        settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        settle()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        settle()
        seconds = time.perf_counter() - began
    moved = 2 * buffer.nbytes * (world_size - 1) / world_size
    wrong = int((buffer != expected).sum())
    if device.type == "cuda":
        del buffer, expected
        torch.cuda.empty_cache()
    if wrong:
        raise ValueError(f"{wrong} of {ELEMENTS[device.type]} sums over {world_size} ranks are wrong")
    return moved / seconds


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(BROKEN)
