"""Codes the changes that a GPU found, and writes them: `python -m astracli.weights.publish.coder SOCKET_FD THREADS`.

The child of `encoder.EncoderProcess`; it ends with its trainer. Over one socket pair it receives `new` (a block of
memory, with its descriptor), `begin` (a file), `work` and `end`, and answers every `work` and `end` in order.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from astracli.process import channel
from astracli.weights.format import codec, container
from astracli.weights.format.container import Planes, Work
from astracli.weights.publish.writing import HashingFile

Bits = np.ndarray[Any, Any]
_TOGETHER = 2
"""Works whose planes are compressed at once: zstd's threads have the next while one is put together."""
_BEHIND = 5
"""Niceness added to the trainer's. Trainer and engine keep a GPU busy; nobody waits for this process."""


class Stored(NamedTuple):
    """One piece's payload in the file."""

    start: int
    length: int
    offset: int
    size: int
    checksum: str
    encoding: str
    changes: int


Job = Callable[[], "list[tuple[int, codec.Encoded]]"]
"""Codes some pieces of a work: their numbers in it, and what became of them."""


def encoded(memory: Bits, work: Work, level: int, threads: int) -> tuple[list[Job], list[Job]]:
    """The jobs that code a work: those for one thread each, and those that use `threads` of zstd's. `memory`: its
    block, uint8."""
    alone: list[Job] = []
    in_planes = []
    for number, (_, length, itemsize, _, _, old_at, new_at) in enumerate(work.pieces):
        if old_at < 0:
            in_planes.append(number)
            continue
        # a piece with a choice of encodings, which are tried on samples: it is dense, or small
        unsigned = container.unsigned(itemsize)
        old, new = (memory[at : at + length * itemsize].view(unsigned) for at in (old_at, new_at))
        alone.append(partial(_by_choice, number, old, new, level))
    if work.planes is None:
        return alone, []
    return alone, [partial(_from_planes, memory, work.planes, work, in_planes, level, threads)]


def _by_choice(number: int, old: Bits, new: Bits, level: int) -> list[tuple[int, codec.Encoded]]:
    return [(number, codec.encode(old, new, level))]


def _from_planes(
    memory: Bits, at: Planes, work: Work, numbers: list[int], level: int, threads: int
) -> list[tuple[int, codec.Encoded]]:  # fmt: skip
    """Those pieces of which the planes hold what is needed."""
    up_to = [0, *memory[at.up_to :][: 4 * len(numbers)].view(np.int32).tolist()]
    planes: list[Bits] = []
    bounds = []
    for (low, high), number in zip(pairwise(up_to), numbers, strict=True):
        changes = slice(*work.pieces[number][3:5])
        short = memory[at.short : at.short + at.changes][changes]
        long = memory[at.long + 4 * low : at.long + 4 * high].view(np.int32)
        values = [memory[at.values + k * at.changes :][: at.changes][changes] for k in range(2)]
        first = len(planes)
        planes += container.list_planes(short, long, values)
        bounds.append((number, len(short), len(long), slice(first, len(planes))))
    frames = container.deflate_many(planes, level, threads)
    found = []
    for number, count, escapes, own in bounds:
        length = work.pieces[number][1]
        payload = container.put_together("gap-ulp", length, count, escapes, 2, frames[own])
        found.append((number, codec.Encoded("gap-ulp", count, payload)))
    return found


def serve(link: socket.socket, threads: int) -> None:
    """Answer until the trainer is gone."""
    blocks: dict[int, Bits] = {}
    jobs: queue.SimpleQueue[Callable[[], dict[str, Any]] | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_answers, args=(link, jobs))
    writer.start()
    try:
        with ThreadPoolExecutor(threads, "encode") as pool, ThreadPoolExecutor(_TOGETHER, "planes") as few:
            _listen(link, pool, few, threads, jobs, blocks)
    finally:  # or nothing would end this process
        jobs.put(None)
        writer.join()


def _listen(
    link: socket.socket, pool: ThreadPoolExecutor, few: ThreadPoolExecutor, threads: int,
    jobs: queue.SimpleQueue[Callable[[], dict[str, Any]] | None], blocks: dict[int, Bits],
) -> None:  # fmt: skip
    out, level, clock = None, 1, BusyClock()
    while True:
        try:
            doc, handle = channel.receive(link)
        except OSError:
            return
        if handle is not None:
            blocks[doc["new"]] = np.frombuffer(mmap.mmap(handle, doc["size"]), np.uint8)
            os.close(handle)
        elif "begin" in doc:
            out, level = HashingFile(Path(doc["begin"])), doc["level"]
        elif out is not None and "work" in doc:
            block, planes, pieces = doc["work"]
            work = Work(block, Planes(*planes) if planes else None, pieces)
            alone, wide = encoded(blocks[block], work, level, threads)
            futures = [pool.submit(clock.timed, job) for job in alone] + [few.submit(clock.timed, job) for job in wide]
            jobs.put(partial(_written, out, work, futures))
        elif out is not None:
            jobs.put(partial(_ended, out, clock))


def _answers(link: socket.socket, jobs: queue.SimpleQueue[Callable[[], dict[str, Any]] | None]) -> None:
    """Write what is coded, in the order in which it was asked for, and say so."""
    while (job := jobs.get()) is not None:
        try:
            doc = job()
        except OSError as error:  # of the disk
            doc = {"error": [error.errno, error.strerror, error.filename]}
        except Exception as error:
            doc = {"error": f"weights were not coded: {type(error).__name__}: {error}"}
        try:
            channel.send(link, doc)
        except OSError:
            return


class BusyClock:
    """Seconds in which at least one job ran: a sum over jobs beside each other would count their waiting for cores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._seconds = 0.0

    def timed(self, job: Job) -> list[tuple[int, codec.Encoded]]:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
        try:
            return job()
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._seconds += time.perf_counter() - self._since

    def taken(self) -> float:
        """The seconds since the last call; no job runs."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
            return seconds


def _written(
    out: HashingFile, work: Work, futures: list[Future[list[tuple[int, codec.Encoded]]]]
) -> dict[str, Any]:  # fmt: skip
    coded = [one for future in futures for one in future.result()]
    begin = time.perf_counter()
    pieces = []
    for number, found in sorted(coded, key=lambda one: one[0]):
        start, length, *_ = work.pieces[number]
        offset = out.write(found.payload)
        checksum = xxhash.xxh3_128_hexdigest(found.payload)
        pieces.append(Stored(start, length, offset, len(found.payload), checksum, found.encoding, found.count))
    return {"pieces": pieces, "write_s": time.perf_counter() - begin}


def _ended(out: HashingFile, clock: BusyClock) -> dict[str, Any]:
    files = {name: (entry.bytes, entry.xxh3) for name, entry in out.close().items()}
    return {"files": files, "encode_s": clock.taken()}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for the trainer, whose end is ours
    os.nice(_BEHIND)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, int(sys.argv[2]))
