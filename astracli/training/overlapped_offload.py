"""Offloaded tensors that pass through a GPU, set after set: while one is worked on, the next comes and the last leaves.

A link to host memory carries both directions at once (PCIe 5 x16: 55 GB/s one way, 99 both, docs/benchmarks.md), and a
GPU copies while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from astracli.process.layout import BUCKETS_IN_FLIGHT
from astracli.training.cpu_offload import CpuOffload

Wait = Callable[[], None]
AHEAD = BUCKETS_IN_FLIGHT - 1
"""Sets on the device or on their way to it; one more leaves."""


class CopyQueue:
    """A queue of copies beside the one in which a GPU computes. On a CPU there is one queue."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, offloaded: Sequence[CpuOffload], copy: Callable[[CpuOffload], None]) -> Wait:
        """Copy these after all that was asked for so far, beside what will be. What is asked for after a call of the
        result comes after the copies."""
        if self._stream is None:
            for offload in offloaded:
                copy(offload)
            return lambda: None
        computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            for offload in offloaded:
                copy(offload)
        done = self._stream.record_event()
        return lambda: computing.wait_event(done)


class OverlappedOffload:
    """Two queues of copies, one each way."""

    def __init__(self, device: torch.device):
        self._coming, self._leaving = CopyQueue(device), CopyQueue(device)

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
                # room is made, and given back, in the order of the work: nobody has it before its last user is done
                for offload in sets[index]:
                    offload.make_room()
                arrived.append(self._coming.send(sets[index], CpuOffload.fill))

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
            leaves = (done, self._leaving.send(done, CpuOffload.save))
            clear()
            left.append(leaves)
            fetch(index + AHEAD)
        clear()
