"""Codes the changes that a GPU found in a process of its own: `python -m astracli.weights.encoder SOCKET_FD THREADS`.

Threads that compress inside a trainer take the interpreter from the thread that asks the GPU for the step's kernels,
and give it back, thousands of times a version: a step at 4 B took a fifth longer. So a child of the trainer compresses,
with threads, and writes the payload. The GPU copies what it found into memory that both processes see (a *block*); the
trainer says where in it the pieces lie, and is told where in the file their payloads are. The child ends with its
trainer.

Both sides of one socket pair. To the child: `new` (a block, with its descriptor), `begin` (a file), `work`, `end`. From
it: an answer to every `work` and `end`, in order.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from astracli.errors import RunFailed
from astracli.weights import channel, codec, container
from astracli.weights.manifest import FileEntry
from astracli.weights.writing import HashingFile

if TYPE_CHECKING:
    import torch

    from astracli.weights.device import Found

Bits = np.ndarray[Any, Any]

_COPIES = 2
"""Passes whose copies to the host run while the next is asked for."""
_WORKS = 4
"""Passes that wait to be coded, or are."""
_LEAST_BLOCK = 1 << 20


class Planes(NamedTuple):
    """Where in a block the gaps and values of a pass lie, bytes."""

    short: int
    """uint8 [C]"""
    long: int
    """int32: gaps of 255 and more"""
    up_to: int
    """int32: how many of those up to the end of each piece"""
    values: int
    """uint8 [2, C], the lower bytes first"""
    changes: int
    """C"""


class Work(NamedTuple):
    """The changed pieces of one pass, as they lie in a block."""

    block: int
    planes: Planes | None
    pieces: list[tuple[int, int, int, int, int, int, int]]
    """(start, length, bytes of an element, first change, behind the last, where its old bits are, its new); -1 for both
    where the planes hold what is needed."""


class Coded(NamedTuple):
    """One piece's payload in the file."""

    start: int
    length: int
    offset: int
    size: int
    checksum: str
    encoding: str
    changes: int


def encoded(memory: Bits, work: Work, level: int) -> list[Callable[[], codec.Encoded]]:
    """What codes each piece of a work, in any thread. `memory`: its block, uint8."""
    found: list[Callable[[], codec.Encoded]] = []
    up_to = np.zeros(0, np.int32)
    if work.planes is not None:
        up_to = memory[work.planes.up_to :][: 4 * len(work.pieces)].view(np.int32)
    for k, (_, length, itemsize, low, high, old_at, new_at) in enumerate(work.pieces):
        if old_at >= 0 or work.planes is None:
            # a piece with a choice of encodings, which are tried on samples: it is dense, or small
            unsigned = container.unsigned(itemsize)
            old, new = (memory[at : at + length * itemsize].view(unsigned) for at in (old_at, new_at))
            found.append(partial(codec.encode, old, new, level))
        else:
            far = slice(int(up_to[k - 1]) if k else 0, int(up_to[k]))
            found.append(partial(_from_planes, memory, work.planes, length, slice(low, high), far, level))
    return found


def _from_planes(
    memory: Bits, at: Planes, length: int, changes: slice, far: slice, level: int
) -> codec.Encoded:  # fmt: skip
    short = memory[at.short : at.short + at.changes][changes]
    long = memory[at.long + 4 * far.start : at.long + 4 * far.stop].view(np.int32)
    values = [memory[at.values + k * at.changes :][: at.changes][changes] for k in range(2)]
    payload = container.assemble("gap-ulp", length, len(short), short, long, values, level)
    return codec.Encoded("gap-ulp", len(short), payload)


# ---- the trainer's side ----------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    number: int
    memory: torch.Tensor


class EncoderProcess:
    """The trainer's end. One file at a time."""

    def __init__(self, threads: int):
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._blocks: dict[int, _Block] = {}
        self._free: list[int] = []
        self.encode_s = self.write_s = self.diff_s = 0.0
        """Of the last file: all threads' coding, writing, and asking the GPU."""
        self.files: dict[str, FileEntry] = {}

    def start(self) -> socket.socket:
        """The way to the child, started by the first call."""
        if self._socket is None:
            self._process, self._socket = channel.child("astracli.weights.encoder", str(self._threads))
        return self._socket

    def block(self, size: int) -> tuple[int, torch.Tensor]:
        """Memory that the child sees: its number, and uint8 [size] of it. Free again when its work is answered."""
        fits = [n for n in self._free if len(self._blocks[n].memory) >= size]
        if fits:
            number = min(fits, key=lambda n: len(self._blocks[n].memory))
            self._free.remove(number)
        else:
            number = self._new(max(_LEAST_BLOCK, 1 << (size - 1).bit_length()))
        return number, self._blocks[number].memory[:size]

    def _new(self, size: int) -> int:
        import torch

        number, handle = len(self._blocks), os.memfd_create("astra-changes", os.MFD_CLOEXEC)
        try:
            os.ftruncate(handle, size)
            memory = torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
            _pin(memory, True)
            channel.send(self.start(), {"new": number, "size": size}, handle)
        finally:
            os.close(handle)
        self._blocks[number] = _Block(number, memory)
        return number

    def code(self, path: Path, level: int, found: Iterable[Found]) -> Iterator[tuple[str, Coded]]:
        """Every piece of what was found, in order, as it lies in the file `path`, with its tensor's name. Afterwards
        `files` and the seconds are those of this file. Raises RunFailed when the child is gone, OSError when it
        cannot write."""
        self.encode_s = self.write_s = self.diff_s = 0.0
        copying: deque[Found] = deque()
        coding: deque[Found] = deque()
        try:
            channel.send(self.start(), {"begin": str(path), "level": level})
            iterator = iter(found)
            while True:
                begin = time.perf_counter()
                last = next(iterator, None)
                self.diff_s += time.perf_counter() - begin
                if last is not None:
                    copying.append(last)
                while copying and (last is None or len(copying) > _COPIES):
                    one = copying.popleft()
                    one.ready.wait()
                    channel.send(self.start(), {"work": one.work})
                    coding.append(one)
                while coding and (last is None or len(coding) > _WORKS):
                    yield from self._answer(coding.popleft())
                if last is None:
                    break
            channel.send(self.start(), {"end": True})
            doc = self._told()
            self.files = {name: FileEntry(size, digest) for name, (size, digest) in doc["files"].items()}
        except ConnectionError as error:
            code = self._process.wait() if self._process is not None else None
            raise RunFailed(
                f"the process that codes weights ended with {code}",
                "the trainer's log holds its last words; killed by the system: it was out of memory",
            ) from error

    def _answer(self, one: Found) -> Iterator[tuple[str, Coded]]:
        doc = self._told()
        self.encode_s += doc["encode_s"]
        self.write_s += doc["write_s"]
        self._free.append(one.work.block)
        for name, piece in zip(one.names, doc["pieces"], strict=True):
            yield name, Coded(*piece)

    def _told(self) -> dict[str, Any]:
        doc, _ = channel.receive(self.start())
        if "error" in doc:
            raise OSError(*doc["error"]) if isinstance(doc["error"], list) else RunFailed(doc["error"])
        return doc

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()
        for block in self._blocks.values():
            _pin(block.memory, False)
        self._blocks, self._free, self._socket, self._process = {}, [], None, None


def _pin(memory: torch.Tensor, wanted: bool) -> None:
    """Let a GPU write into it by itself, or no longer. It writes into other memory too, but slower."""
    import torch

    if torch.cuda.is_available():
        runtime: Any = torch.cuda.cudart()
        if wanted:
            runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        else:
            runtime.cudaHostUnregister(memory.data_ptr())


# ---- the child -------------------------------------------------------------------------------------------------------


def serve(link: socket.socket, threads: int) -> None:
    """Answer until the trainer is gone."""
    blocks: dict[int, Bits] = {}
    jobs: queue.SimpleQueue[Callable[[], dict[str, Any]] | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_answers, args=(link, jobs))
    writer.start()
    out, level = None, 1
    with ThreadPoolExecutor(threads, "encode") as pool:
        while True:
            try:
                doc, handle = channel.receive(link)
            except OSError:
                break
            if handle is not None:
                blocks[doc["new"]] = np.frombuffer(mmap.mmap(handle, doc["size"]), np.uint8)
                os.close(handle)
            elif "begin" in doc:
                out, level = HashingFile(Path(doc["begin"])), doc["level"]
            elif out is not None and "work" in doc:
                block, planes, pieces = doc["work"]
                work = Work(block, Planes(*planes) if planes else None, pieces)
                futures = [pool.submit(_timed, one) for one in encoded(blocks[block], work, level)]
                jobs.put(partial(_written, out, work, futures))
            elif out is not None:
                jobs.put(partial(_ended, out))
        jobs.put(None)
        writer.join()


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


def _timed(work: Callable[[], codec.Encoded]) -> tuple[codec.Encoded, float]:
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def _written(out: HashingFile, work: Work, futures: list[Future[tuple[codec.Encoded, float]]]) -> dict[str, Any]:
    pieces, encode_s, write_s = [], 0.0, 0.0
    for (start, length, *_), future in zip(work.pieces, futures, strict=True):
        found, seconds = future.result()
        begin = time.perf_counter()
        offset = out.write(found.payload)
        checksum = xxhash.xxh3_128_hexdigest(found.payload)
        pieces.append(Coded(start, length, offset, len(found.payload), checksum, found.encoding, found.count))
        write_s += time.perf_counter() - begin
        encode_s += seconds
    return {"pieces": pieces, "encode_s": encode_s, "write_s": write_s}


def _ended(out: HashingFile) -> dict[str, Any]:
    return {"files": {name: (entry.bytes, entry.xxh3) for name, entry in out.close().items()}}


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, int(sys.argv[2]))
