"""Parked tensors that pass through a GPU, set after set: while one is worked on, the next comes and the last leaves.

A link to host memory carries both directions at once (PCIe 5 x16: 55 GB/s one way, 99 both, docs/benchmarks.md), and a
GPU copies while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from astracli.process.layout import PASSING
from astracli.training.parking import Parking

Wait = Callable[[], None]
AHEAD = PASSING - 1
"""Sets on the device or on their way to it; one more leaves."""


class Lane:
    """A queue of copies beside the one in which a GPU computes. On a CPU there is one queue."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, parked: Sequence[Parking], copy: Callable[[Parking], None]) -> Wait:
        """Copy these after all that was asked for so far, beside what will be. What is asked for after a call of the
        result comes after the copies."""
        if self._stream is None:
            for parking in parked:
                copy(parking)
            return lambda: None
        computing = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            for parking in parked:
                copy(parking)
        done = self._stream.record_event()
        return lambda: computing.wait_event(done)


class Passage:
    """Two lanes, one each way."""

    def __init__(self, device: torch.device):
        self._coming, self._leaving = Lane(device), Lane(device)

    def through(
        self,
        sets: Sequence[Sequence[Parking]],
        work: Callable[[int], Sequence[Parking]],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`work(i)` with `sets[i]` on the device; what it returns then waits on the host. `meanwhile` runs while the
        first sets come."""
        arrived: list[Wait] = []

        def fetch(index: int) -> None:
            if index < len(sets):
                # room is made, and given back, in the order of the work: nobody has it before its last user is done
                for parking in sets[index]:
                    parking.make_room()
                arrived.append(self._coming.send(sets[index], Parking.fill))

        left: list[tuple[Sequence[Parking], Wait]] = []

        def clear() -> None:
            for parked, gone in left:
                gone()
                for parking in parked:
                    parking.leave()
            left.clear()

        for index in range(AHEAD):
            fetch(index)
        meanwhile()
        for index in range(len(sets)):
            arrived[index]()
            done = work(index)
            leaves = (done, self._leaving.send(done, Parking.save))
            clear()
            left.append(leaves)
            fetch(index + AHEAD)
        clear()
