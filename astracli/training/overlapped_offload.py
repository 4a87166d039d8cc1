"""Overlapped offload: tensors pass through a GPU, set after set; one is worked on while others come and leave.

A link to host memory carries both directions at once (PCIe 5 x16: 55 GB/s one way, 99 both, docs/benchmarks.md), and a
GPU copies while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from astracli.process.layout import BUCKETS_IN_FLIGHT
from astracli.training.cpu_offload import CpuOffload

Copy = Callable[[CpuOffload], None]
Wait = Callable[[], None]
AHEAD = BUCKETS_IN_FLIGHT - 1
"""Sets on the device or on their way to it; one more leaves."""


class OverlappedOffload:
    """Two streams of copies, one each way, beside the one in which a GPU computes. On a CPU there are none."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self._coming, self._leaving = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))

    def through(
        self,
        sets: Sequence[Sequence[CpuOffload]],
        work: Callable[[int], Sequence[CpuOffload]],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`work(i)` with `sets[i]` on the device; what it returns then waits on the host. `meanwhile` runs while the
        first sets come."""
        arrived: list[Wait] = []

        def fetch(index: int) -> None:
            if index < len(sets):
                # room is made, and given back, in the order of the work: nobody gets it before its last user is done
                for offload in sets[index]:
                    offload.make_room()
                arrived.append(_send(self._coming, sets[index], CpuOffload.fill))

        left: list[tuple[Sequence[CpuOffload], Wait]] = []

        def clear() -> None:
            for offloaded, gone in left:
                gone()
                for offload in offloaded:
                    offload.leave()
            left.clear()

        for index in range(AHEAD):
            fetch(index)
        meanwhile()
        for index in range(len(sets)):
            arrived[index]()
            done = work(index)
            leaves = (done, _send(self._leaving, done, CpuOffload.save))
            clear()
            left.append(leaves)
            fetch(index + AHEAD)
        clear()


def _send(
    stream: torch.cuda.Stream | None, offloaded: Sequence[CpuOffload], copy: Callable[[CpuOffload], None]
) -> Wait:
    """Copy these in `stream`, after all that was asked for so far and beside what will be. What is asked for after a
    call of the result comes after the copies."""
    if stream is None:
        for offload in offloaded:
            copy(offload)
        return lambda: None
    computing = torch.cuda.current_stream(stream.device)
    stream.wait_stream(computing)
    with torch.cuda.stream(stream):
        for offload in offloaded:
            copy(offload)
    done = stream.record_event()
    return lambda: computing.wait_event(done)
