"""Writes checkpoints beside the steps that follow: a copy in host memory first, from there to disk, hashed on the way.

The copy is over before anything that it is made from changes: `Masters` waits for it before an update, and before it
leaves a GPU. One thread asks for the copies, piece after piece, in a stream of its own; another one hashes and writes.
A piece is large, so that they take the interpreter from the step a few times a second at most (a quarter of a GiB is
hashed and written without it). The copy has memory for the whole state where the host has it; with less, pieces are
used again once they are on disk, and an update that comes too early waits for the disk.

Each rank writes a file of its own. Rank 0 waits for all of them, makes the checkpoint whole and drops older ones.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from astracli.kernels.upload import host_memory
from astracli.runs.run_dir import write_atomic
from astracli.training import checkpoint
from astracli.training.checkpoint import COMPLETE, FORMAT, META, Entry
from astracli.training.fsdp import Ranks
from astracli.training.optimizer import Masters

PIECE_BYTES = 1 << 28
ASKED_FOR = 2
"""Pieces whose copy has been asked for: the second keeps the link busy when the first ends (5 ms at 55 GB/s)."""
LEAST_PIECES = 4
"""Of memory for copies, where there is none for all of them: one is filled, one written, two wait."""
ROOM = 0.8
"""Of the host's memory that nothing else needs, now or by the plan, what the copies of all ranks may fill."""
RNG_BYTES = 1 << 16
"""More than a random state has."""
LOOK_S = 0.05

Slice = tuple[Tensor, int, int]
"""A tensor as bytes, and from where to where."""


@dataclass
class _Piece:
    block: Tensor
    size: int
    ready: torch.cuda.Event | None


class Saver:
    """One rank's part. Errors of the threads come out of the next `begin`, `check` or `wait`."""

    def __init__(self, directory: Path, ranks: Ranks, *, keep: int, beside: bool = True, others: int = 0):
        """`beside`: steps go on while a checkpoint is written, so that its copy needs memory. `others`: bytes of the
        host's memory that everything else of the run may come to need."""
        self._others = others
        self.directory, self.ranks, self.keep, self.beside = directory, ranks, keep, beside
        self.whole: int | None = None
        """Step of the newest checkpoint that this made whole; on rank 0."""
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called in a thread with its error."""
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.blocks: list[Tensor] = []
        """Memory for copies."""
        self._block_bytes = 0
        self._none: BaseException | None = None
        """Why there is no memory at all for copies."""
        self._memory: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._save: _Save | None = None
        self._figures: dict[str, float] = {}

    def prepare(self, masters: Masters) -> None:
        """Make the memory for copies, in a thread: to pin tens of GB takes seconds. Nothing the second time."""
        if self._memory is None:
            state = RNG_BYTES + sum(12 * value.numel() for value in masters.values.values())
            self._block_bytes = min(PIECE_BYTES, max(1, state))
            count = self._pieces(-(-state // self._block_bytes))
            self._memory = threading.Thread(target=self._make, args=(count,), name="checkpoint-memory", daemon=True)
            self._memory.start()

    def prepared(self) -> None:
        """Until `prepare` has made its memory."""
        if self._memory is not None:
            self._memory.join()

    def _pieces(self, all_of_them: int) -> int:
        if not self.beside:
            return min(LEAST_PIECES, all_of_them)
        from astracli.machine.read import system

        host = system()
        room = ROOM * min(host.memory_available, host.memory_total - self._others) / self.ranks.world_size
        return max(1, min(all_of_them, max(LEAST_PIECES, int(room // self._block_bytes))))

    def _make(self, count: int) -> None:
        try:
            for _ in range(count):
                self.blocks.append(host_memory(self._block_bytes, self.ranks.device, self))
                self._free.put(self.blocks[-1])
        except Exception as error:
            found = f"{len(self.blocks)} of {count} pieces of memory for the checkpoint's copy: {error}"
            print(f"warning: {found}", file=sys.stderr, flush=True)
            if not self.blocks:  # with some pieces it is slower
                self._none = error
                self._free.put(None)

    def begin(self, step: int, version: int, masters: Masters) -> None:
        """Begin to write the state after `step` steps; the one before is waited for. A collective."""
        self._written()
        self.prepare(masters)
        working = self.directory / f".step_{step:06d}.tmp"
        if self.ranks.first:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
        self.ranks.barrier()
        meta = {
            "format": FORMAT,
            "step": step,
            "version": version,
            "updates": masters.updates,
            "world_size": self.ranks.world_size,
            "names": sorted(masters.values),
        }
        self._save = _Save(self, working, meta, _parts(masters, self.ranks))
        masters.before_change = self.copied
        self._save.start()

    @property
    def busy(self) -> bool:
        return self._save is not None and not self._save.done.is_set()

    def copied(self) -> float:
        """Until nothing is read any more from what the trainer will change: the seconds that took."""
        if self._save is None or self._save.copied.is_set():
            return 0.0
        began = time.perf_counter()
        self._save.copied.wait()
        return time.perf_counter() - began

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
        self.prepared()

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

    def _fail(self, error: BaseException) -> None:
        if self._save is not None:
            self._save.fail(error)
        if self.on_failure is not None:
            self.on_failure(error)


class _Save:
    """One checkpoint on its way: two threads."""

    def __init__(self, saver: Saver, working: Path, meta: dict[str, Any], parts: list[tuple[Entry, Tensor]]):
        self.copied, self.done = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._saver, self._working, self._meta = saver, working, meta
        self._entries = [entry for entry, _ in parts]
        self._parts = [part for _, part in parts]
        self._full: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._began = time.perf_counter()
        self._copy_s = 0.0
        device = saver.ranks.device
        if device.type == "cuda":
            saver._stream = saver._stream or torch.cuda.Stream(device)
            saver._stream.wait_stream(torch.cuda.current_stream(device))

        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for work, name in ((self._copy, "checkpoint-copy"), (self._write, "checkpoint-write"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._saver._fail(error)

    def fail(self, error: BaseException) -> None:
        """Let go of everyone who waits."""
        self.error = self.error or error
        self._saver._free.put(None)
        self._full.put(None)
        self.copied.set()
        self.done.set()

    # ---- the copy

    def _copy(self) -> None:
        stream = self._saver._stream
        if stream is None:
            self._copies(None)
            return
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            self._copies(stream)

    def _copies(self, stream: torch.cuda.Stream | None) -> None:
        """Never more than `ASKED_FOR` pieces at a time: a GPU's copies to the host pass through one queue, whatever
        stream they are in, and a figure that the step reads would come after all that was asked for before it."""
        last: torch.cuda.Event | None = None
        asked_for: deque[torch.cuda.Event] = deque()
        for slices in pieces(self._parts, self._saver._block_bytes):
            if len(asked_for) == ASKED_FOR:
                asked_for.popleft().synchronize()
            block = self._saver._free.get()
            if block is None:
                if self._saver._none is not None:
                    raise self._saver._none
                return
            size = 0
            for part, low, high in slices:
                block[size : size + high - low].copy_(part[low:high], non_blocking=True)
                size += high - low
            if stream is not None:
                last = torch.cuda.Event(blocking=True)  # who waits for it leaves its core to others
                last.record(stream)
                asked_for.append(last)
            self._full.put(_Piece(block, size, last))
        self._full.put(None)
        if last is not None:
            last.synchronize()
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
                self._saver._free.put(piece.block)
            if self.error is not None:
                return
            os.fsync(file.fileno())
        index = {"bytes": size, "xxh3": digest.hexdigest(), "tensors": self._entries}
        write_atomic(self._working / f"rank_{rank}.json", json.dumps(index), sync=True)
        if self._saver.ranks.first:
            self._make_whole()
        self.copied.wait()
        self._saver._figures = {
            "checkpoint_copy_s": self._copy_s,
            "checkpoint_write_s": time.perf_counter() - self._began,
            "checkpoint_bytes": float(size),
        }
        self.done.set()

    def _make_whole(self) -> None:
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
        checkpoint.prune(directory, self._saver.keep)
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
    """What this rank writes, as bytes where they lie. What every rank holds whole is rank 0's to write."""
    first, second = masters.moments()
    found: list[tuple[str, str, int, Tensor]] = []
    for name, value in masters.values.items():
        if not value.numel() or (masters.replicated(name) and not ranks.first):
            continue
        split_masters = masters.split_masters.parts(name)
        mine = {"high": split_masters[0], "rest": split_masters[1]} if split_masters is not None else {"value": value}
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
