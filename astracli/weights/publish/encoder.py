"""The trainer's side of the process that codes what a GPU found (`coder`).

Threads that compress inside a trainer compete for the interpreter with the thread that launches the step's kernels: a
step at 4 B took a fifth longer. So a child of the trainer compresses, with threads of its own, and writes the payload.
The GPU copies what it found into memory that both processes share (a *block*). The trainer says where in it the pieces
lie, and gets back where in the file their payloads are.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.errors import RunFailed
from astracli.process import channel
from astracli.weights.format.manifest import FileEntry
from astracli.weights.publish.coder import Stored

if TYPE_CHECKING:
    import torch

    from astracli.weights.device.difference import PassChanges

COPIES = 2
"""Passes whose copies to the host run while the next is asked for."""
WORKS = 4
"""Passes that wait to be coded, or are."""
_LEAST_BLOCK = 1 << 20
_END_S = 10.0
"""For the child to end once its socket is closed."""


class EncoderProcess:
    """The trainer's end. One file at a time."""

    def __init__(self, threads: int):
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.blocks: dict[int, torch.Tensor] = {}
        self._free: list[int] = []
        self.encode_s = self.write_s = self.diff_s = 0.0
        """Of the last file, by the clock: coding, writing (beside the coding of what comes next), asking the GPU."""
        self.files: dict[str, FileEntry] = {}

    def start(self) -> socket.socket:
        """The socket to the child, which the first call starts."""
        if self._socket is None:
            self._process, self._socket = channel.child("astracli.weights.publish.coder", str(self._threads))
        return self._socket

    def block(self, size: int) -> tuple[int, torch.Tensor]:
        """Memory that the child shares: its number, and uint8 [size] of it. Free again when its work is answered."""
        fits = [n for n in self._free if len(self.blocks[n]) >= size]
        if fits:
            number = min(fits, key=lambda n: len(self.blocks[n]))
            self._free.remove(number)
        else:
            number = self._new(max(_LEAST_BLOCK, 1 << (size - 1).bit_length()))
        return number, self.blocks[number][:size]

    def _new(self, size: int) -> int:
        import torch

        number, handle = len(self.blocks), os.memfd_create("astra-changes", os.MFD_CLOEXEC)
        try:
            os.ftruncate(handle, size)
            memory = torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)
            _pin(memory)
            self.blocks[number] = memory
            channel.send(self.start(), {"new": number, "size": size}, handle)
        finally:
            os.close(handle)
        return number

    def code(self, path: Path, level: int, found: Iterable[PassChanges]) -> Iterator[tuple[str, Stored]]:
        """Every piece of what was found, in order, as it lies in the file `path`, with its tensor's name. Afterwards
        `files` and the seconds are those of this file. Raises RunFailed when the child is gone, OSError when it
        cannot write. After any error the next file gets another child."""
        self.encode_s = self.write_s = self.diff_s = 0.0
        copying: deque[PassChanges] = deque()
        coding: deque[PassChanges] = deque()
        try:
            channel.send(self.start(), {"begin": str(path), "level": level})
            iterator = iter(found)
            while True:
                begin = time.perf_counter()
                last = next(iterator, None)
                self.diff_s += time.perf_counter() - begin
                if last is not None:
                    copying.append(last)
                while copying and (last is None or len(copying) > COPIES):
                    one = copying.popleft()
                    one.ready.wait()
                    channel.send(self.start(), {"work": one.work})
                    coding.append(one)
                while coding and (last is None or len(coding) > WORKS):
                    yield from self._answer(coding.popleft())
                if last is None:
                    break
            channel.send(self.start(), {"end": True})
            doc = self._receive()
            self.encode_s = doc["encode_s"]
            self.files = {name: FileEntry(size, digest) for name, (size, digest) in doc["files"].items()}
        except ConnectionError as error:
            raise RunFailed(
                f"the process that codes weights ended with {self.close()}",
                "the trainer's log holds its last lines; killed by the system: it was out of memory",
            ) from error
        except BaseException:  # answers that are under way belong to this file
            self.close()
            raise

    def _answer(self, one: PassChanges) -> Iterator[tuple[str, Stored]]:
        doc = self._receive()
        self.write_s += doc["write_s"]
        self._free.append(one.work.block)
        for name, piece in zip(one.names, doc["pieces"], strict=True):
            yield name, Stored(*piece)

    def _receive(self) -> dict[str, Any]:
        doc, _ = channel.receive(self.start())
        if "error" in doc:
            raise OSError(*doc["error"]) if isinstance(doc["error"], list) else RunFailed(doc["error"])
        return doc

    def close(self) -> int | None:
        """End the child; its exit status, None where there was none."""
        import torch

        code = None
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                code = self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
        if self.blocks and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies into them may be under way
            for memory in self.blocks.values():
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self.blocks, self._free, self._socket, self._process = {}, [], None, None
        return code


def _pin(memory: torch.Tensor) -> None:
    """Let a GPU write into it by itself. Raises RunFailed when it cannot be pinned."""
    import torch

    if not torch.cuda.is_available():
        return
    if code := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        raise RunFailed(
            f"{memory.nbytes} bytes of host memory cannot be pinned for the published changes (CUDA error {code})",
            "free host memory, or let the trainer use fewer GPUs of this machine",
        )
