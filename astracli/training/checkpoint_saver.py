"""Writes checkpoints while steps go on: the state is copied to host memory, and from there hashed and written to disk.

The copy ends before its source changes: `Masters` waits for it before an update, and before it leaves a GPU. One thread
asks for the copies, piece after piece, in a stream of its own; another one hashes and writes. A piece is large, so that
the threads take the interpreter from the step a few times a second at most (hashing and writing do not hold it). With
less host memory than the state needs, blocks are used again once they are on disk, and an update that comes too early
waits for the disk.

Each rank writes a file of its own. Rank 0 waits for all of them, makes the checkpoint whole and drops older ones.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from astracli.process.atomic import write_atomic
from astracli.training import checkpoint
from astracli.training.checkpoint import COMPLETE, FORMAT, META, Entry
from astracli.training.checkpoint_memory import CopyMemory
from astracli.training.fsdp import Ranks
from astracli.training.optimizer import Masters

ASKED_FOR = 2
"""Copies that have been asked for at a time: the second keeps the link busy when the first ends."""
COPY_BYTES = 1 << 26
"""Of one copy at most: 1.2 ms at 55 GB/s. A figure that the step reads waits for those that have been asked for."""
RNG_BYTES = 1 << 16
"""More than a random state has."""
LOOK_S = 0.05

Slice = tuple[Tensor, int, int]
"""A tensor as bytes, and from where to where."""


class _Piece(NamedTuple):
    block: Tensor
    size: int
    ready: torch.cuda.Event | None


class Saver:
    """One rank's part. Errors of the threads come out of the next `begin`, `check` or `wait`."""

    def __init__(self, directory: Path, ranks: Ranks, *, keep: int, beside: bool = True, others: int = 0):
        """`beside`, `others`: as in `CopyMemory`."""
        self.directory, self.ranks, self.keep, self.beside, self._others = directory, ranks, keep, beside, others
        self.whole: int | None = None
        """Step of the newest checkpoint that this made whole; on rank 0."""
        self.kept: Callable[[], Collection[int]] = tuple
        """Steps whose checkpoint stays although it is none of the newest; asked when another has become whole."""
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        """Called in a thread with its error."""
        self.memory: CopyMemory | None = None
        self.stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._save: Save | None = None
        self._figures: dict[str, float] = {}

    def prepare(self, masters: Masters) -> CopyMemory:
        """The memory for copies, which is made once and by a thread."""
        if self.memory is None:
            state = RNG_BYTES + sum(12 * value.numel() for value in masters.values.values())
            self.memory = CopyMemory(state, self.ranks, beside=self.beside, others=self._others)
        return self.memory

    def begin(self, step: int, masters: Masters) -> None:
        """Begin to write the state after `step` steps; the checkpoint before is waited for. A collective."""
        self._written()
        memory = self.prepare(masters)
        working = self.directory / f".step_{step:06d}.tmp"
        if self.ranks.first:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
        self.ranks.barrier()
        meta = {
            "format": FORMAT,
            "step": step,
            "version": step,
            "updates": masters.adam.updates,
            "world_size": self.ranks.world_size,
            "names": sorted(masters.values),
            **masters.origin,
        }
        self._save = Save(self, memory, working, meta, _parts(masters, self.ranks))
        masters.before_change = self.copied

    @property
    def busy(self) -> bool:
        return self._save is not None and not self._save.done.is_set()

    def copied(self) -> None:
        """Until nothing is read any more from what the trainer will change."""
        if self._save is not None:
            self._save.copied.wait()

    def check(self) -> None:
        """Raise the error of a thread, if it has come to one."""
        if self._save is not None and self._save.error is not None:
            raise self._save.error

    def wait(self) -> None:
        """Until the checkpoint is whole; on another rank than the first, until its part is on disk.

        Its threads have ended then. One that still had a tensor to release when the interpreter ends would abort the
        process.
        """
        self._written()
        if self.memory is not None:
            self.memory.wait()

    def _written(self) -> None:
        if self._save is not None:
            self._save.done.wait()
            self.check()
            self._save.join()
            self._save = None

    def figures(self) -> dict[str, float]:
        """Seconds and bytes of what was written since the last call."""
        found, self._figures = self._figures, {}
        return found


class Save:
    """One checkpoint on its way: two threads."""

    def __init__(
        self,
        saver: Saver,
        memory: CopyMemory,
        working: Path,
        meta: dict[str, Any],
        parts: list[tuple[Entry, Tensor]],
    ):
        self.copied, self.done = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._saver, self._memory, self._working, self._meta = saver, memory, working, meta
        self._entries = [entry for entry, _ in parts]
        self._parts = [part for _, part in parts]
        self._full: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._began = time.perf_counter()
        self._copy_s = 0.0
        if saver.stream is not None:
            saver.stream.wait_stream(torch.cuda.current_stream(saver.ranks.device))
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for work, name in ((self._copy, "checkpoint-copy"), (self._write, "checkpoint-write"))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        """An error ends both threads and everyone who waits for them."""
        try:
            work()
        except BaseException as error:
            self.error = self.error or error
            self._memory.give(None)
            self._full.put(None)
            self.copied.set()
            self.done.set()
            self._saver.on_failure(error)

    # ---- the copy

    def _copy(self) -> None:
        """Never more than `ASKED_FOR` copies at a time: a GPU's copies to the host pass through one queue, whatever
        stream they are in, and a figure that the step reads would come after all that was asked for before it."""
        stream = self._saver.stream
        asked_for: deque[torch.cuda.Event] = deque()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for slices in pieces(self._parts, self._memory.block_bytes):
                block = self._memory.take()
                if block is None:
                    return
                size = 0
                for part, low, high in slices:
                    for place in range(low, high, COPY_BYTES):
                        if len(asked_for) == ASKED_FOR:
                            asked_for.popleft().synchronize()
                        bytes_ = min(COPY_BYTES, high - place)
                        block[size : size + bytes_].copy_(part[place : place + bytes_], non_blocking=True)
                        size += bytes_
                        if stream is not None:
                            asked_for.append(torch.cuda.Event(blocking=True))  # who waits leaves its core to others
                            asked_for[-1].record(stream)
                self._full.put(_Piece(block, size, asked_for[-1] if asked_for else None))
        self._full.put(None)
        for event in asked_for:
            event.synchronize()
        self._copy_s = time.perf_counter() - self._began
        self.copied.set()

    # ---- to disk

    def _write(self) -> None:
        rank, digest, size = self._saver.ranks.rank, xxhash.xxh3_64(), 0
        path = self._working / f"rank_{rank}.bin"
        with path.open("wb", buffering=0) as file:
            while (piece := self._full.get()) is not None:
                if piece.ready is not None:
                    piece.ready.synchronize()
                content = piece.block[: piece.size].numpy().data
                digest.update(content)
                write_all(file, content)
                size += piece.size
                self._memory.give(piece.block)
            if self.error is not None:
                return
            os.fsync(file.fileno())
        index = {"bytes": size, "xxh3": digest.hexdigest(), "tensors": self._entries}
        write_atomic(self._working / f"rank_{rank}.json", json.dumps(index), sync=True)
        if self._saver.ranks.first:
            self.make_whole()
        self.copied.wait()
        self._saver._figures = {
            "checkpoint_copy_s": self._copy_s,
            "checkpoint_write_s": time.perf_counter() - self._began,
            "checkpoint_bytes": float(size),
        }
        self.done.set()

    def make_whole(self) -> None:
        """Every rank's part is on disk: list them, rename, drop older checkpoints."""
        indices = [self._working / f"rank_{rank}.json" for rank in range(self._saver.ranks.world_size)]
        while not all(path.exists() for path in indices):
            if self.error is not None:
                return
            time.sleep(LOOK_S)
        files: dict[str, tuple[int, str]] = {}
        for path in indices:
            index = json.loads(path.read_text())
            files[f"{path.stem}.bin"] = (index["bytes"], index["xxh3"])
        write_atomic(self._working / META, json.dumps(self._meta), sync=True)
        for path in (*indices, self._working / META):
            files[path.name] = (path.stat().st_size, checkpoint.digest_of(path))
        write_atomic(self._working / COMPLETE, json.dumps({"files": files}), sync=True)
        checkpoint.sync(self._working)
        directory, step = self._saver.directory, int(self._meta["step"])
        target = checkpoint.place(directory, step)
        if target.exists():
            shutil.rmtree(target)
        os.replace(self._working, target)
        checkpoint.sync(directory)
        checkpoint.prune(directory, self._saver.keep, self._saver.kept())
        self._saver.whole = step


def write_all(file: Any, content: memoryview) -> None:
    """One system call writes 2 GiB at most, and on a full disk what still fits."""
    while content:
        content = content[file.write(content) :]


def pieces(parts: list[Tensor], size: int) -> Iterator[list[Slice]]:
    """What is copied together: slices of parts, in their order, of `size` bytes in all; the last piece has fewer."""
    piece: list[Slice] = []
    room = size
    for part in parts:
        low = 0
        while low < len(part):
            high = min(len(part), low + room)
            piece.append((part, low, high))
            room -= high - low
            low = high
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _parts(masters: Masters, ranks: Ranks) -> list[tuple[Entry, Tensor]]:
    """What this rank writes, as bytes where they lie. Rank 0 writes what every rank holds whole, the first replica what
    all replicas hold."""
    first, second = masters.adam.moments()
    found: list[tuple[str, str, int, Tensor]] = []
    for name, value in masters.values.items():
        if not value.numel() or not ranks.in_first_replica or (masters.replicated(name) and not ranks.first):
            continue
        split = masters.split_masters.parts(name)
        mine = {"value": value} if split is None else {"high": split[0], "rest": split[1]}
        mine |= {"first": first[name], "second": second[name]}
        found += [(kind, name, masters.start(name), tensor) for kind, tensor in mine.items()]
    found.append(("rng", str(ranks.rank), 0, torch.get_rng_state()))
    parts, offset = [], 0
    for kind, name, start, tensor in found:
        flat = tensor.detach().reshape(-1)
        entry = Entry(kind, name, str(flat.dtype).removeprefix("torch."), start, flat.numel(), offset)
        parts.append((entry, flat.view(torch.uint8)))
        offset += flat.nbytes
    return parts
