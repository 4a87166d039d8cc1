"""Large tensors between a GPU and the host: in chunks, through pinned memory, several threads at a time.

A copy into memory that was never touched runs at one or two gigabytes a second and thread, whatever the GPU can do.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from astracli.weights.format import digest

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20
"""Bytes of one chunk."""
BUFFERS = 8
"""Pinned chunks of a process that are under way at once."""

Bits = np.ndarray[Any, Any]
_local = threading.local()


def chunks_of(flat: torch.Tensor) -> Iterator[tuple[Bits, Callable[[], None]]]:
    """(bits of a chunk on the host, what to call when they are no longer needed), in order.

    A GPU's chunks lie in pinned buffers: the iteration waits while all of them are in use.
    """
    size = CHUNK // flat.element_size()
    if flat.device.type == "cpu":
        bits = digest.bits_of(flat)
        for at in range(0, len(bits), size):
            yield bits[at : at + size], _nothing
        return
    import torch

    free = pinned_buffers()
    for at in range(0, len(flat), size):
        piece = flat[at : at + size]
        buffer = free.get()
        host = buffer[: piece.nbytes].view(piece.dtype)
        host.copy_(piece, non_blocking=True)
        torch.cuda.current_stream(flat.device).synchronize()
        yield digest.bits_of(host), lambda buffer=buffer: free.put(buffer)  # type: ignore[misc]


def _nothing() -> None:
    """A chunk of the tensor's own memory needs no giving back."""


@lru_cache(maxsize=1)
def pinned_buffers() -> queue.SimpleQueue[torch.Tensor]:
    import torch

    found: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
    for _ in range(BUFFERS):
        found.put(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True))
    return found


def to_host(flats: Mapping[str, torch.Tensor], run: Callable[..., Iterable[Any]] = map) -> dict[str, torch.Tensor]:
    """Copies of GPU tensors in ordinary memory. `run` maps over chunks: `map`, or a thread pool's."""
    import torch

    copies = {name: torch.empty(flat.shape, dtype=flat.dtype) for name, flat in flats.items()}

    def jobs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, flat in flats.items():
            size = CHUNK // flat.element_size()
            for at in range(0, len(flat), size):
                yield copies[name][at : at + size], flat[at : at + size]

    (device,) = {flat.device for flat in flats.values()}
    torch.cuda.current_stream(device).synchronize()  # the threads' own streams do not wait for it
    for _ in run(_bring, jobs()):
        pass
    return copies


def _bring(job: tuple[torch.Tensor, torch.Tensor]) -> None:
    import torch

    target, source = job
    with torch.cuda.device(source.device):  # a thread begins on the first GPU, whose memory is not ours
        if not hasattr(_local, "buffer"):
            _local.buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
            _local.stream = torch.cuda.Stream(source.device)
        host = _local.buffer[: source.nbytes].view(source.dtype)
        with torch.cuda.stream(_local.stream):
            host.copy_(source, non_blocking=True)
        _local.stream.synchronize()
    np.copyto(digest.bits_of(target), digest.bits_of(host))


def to_device(pairs: Iterable[tuple[torch.Tensor, Bits]]) -> None:
    """Overwrite each view, signed integers on any device, with bits of its width, which may lie in a mapped file."""
    import torch

    waiting: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def reclaim(most: int) -> None:
        while len(waiting) > most:
            event, buffer = waiting.popleft()
            event.synchronize()
            pinned_buffers().put(buffer)

    for view, bits in pairs:
        if view.device.type == "cpu":
            np.copyto(view.numpy().view(bits.dtype), bits)
            continue
        size = CHUNK // bits.itemsize
        for at in range(0, len(bits), size):
            chunk = bits[at : at + size]
            reclaim(1)
            buffer = pinned_buffers().get()
            host = buffer[: chunk.nbytes].view(view.dtype)
            np.copyto(host.numpy().view(bits.dtype), chunk)
            view[at : at + size].copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            waiting.append((event, buffer))
    reclaim(0)
