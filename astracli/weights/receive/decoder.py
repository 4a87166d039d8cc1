"""Decodes staged payloads in a process of its own: `python -m astracli.weights.receive.decoder SOCKET_FD`.

An engine's scheduler is a Python loop that never sleeps. A thread that decodes beside it would wait for the interpreter
after each of thousands of short calls, and would slow the scheduler down. So a child of the engine decodes into
anonymous shared memory, and sends its descriptor and a list of spans; the engine's thread makes a few large calls. The
child ends with its engine. It forks for every plan, because threads would compete for its own interpreter.

Over one socket pair it receives a stage directory and answers with a document, and a descriptor when all is well.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from astracli.process import channel
from astracli.weights import WeightCorrupt
from astracli.weights.format import flat
from astracli.weights.format.manifest import Manifest, TensorEntry
from astracli.weights.receive import reading

_PROCESSES = 8
LEAST_BYTES = 1 << 20
"""Bytes of payload for each process that are worth a fork."""


class DecoderProcess:
    """The engine's end. One plan at a time; `prepare` has the meaning and the errors of `reading.prepare`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> socket.socket:
        """The socket to a living child."""
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        self.close()
        self._process, self._socket = channel.child("astracli.weights.receive.decoder")
        return self._socket

    def prepare(self, stage_dir: Path) -> reading.Prepared:
        begin = time.perf_counter()
        try:
            link = self.start()
            channel.send(link, {"stage": str(stage_dir)})
            doc, handle = channel.receive(link)
        except OSError as error:
            return self._here(stage_dir, error)
        if "unable" in doc:
            return self._here(stage_dir, doc["unable"])
        if "error" in doc:
            raise WeightCorrupt(doc["error"])
        assert handle is not None
        prepared = _rebuilt(doc, handle)
        prepared.plan = reading.read(stage_dir / reading.NEXT)
        if prepared.plan != doc["plan"].encode():
            raise WeightCorrupt("another plan was staged while this one was decoded")
        prepared.decode_s = time.perf_counter() - begin
        return prepared

    @staticmethod
    def _here(stage_dir: Path, reason: object) -> reading.Prepared:
        """Decode in this thread: slow, but not in the pause."""
        print(f"warning: weights are decoded inside the engine: {reason}", file=sys.stderr, flush=True)
        return reading.prepare(stage_dir)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()


def _rebuilt(doc: dict[str, Any], handle: int) -> reading.Prepared:
    """A plan from what the child says and from its memory, whose descriptor is closed here."""
    try:
        size = os.fstat(handle).st_size
        memory = np.frombuffer(mmap.mmap(handle, size), np.uint8) if size else np.zeros(0, np.uint8)
    finally:
        os.close(handle)
    prepared = reading.Prepared(b"", doc["version"], doc["kind"], doc["base_version"], doc["model_path"])
    prepared.bytes, prepared.flat = doc["bytes"], []
    for step in doc["steps"]:
        tensors = tuple(TensorEntry(n, d, tuple(s), e, c, x, ()) for n, d, s, e, c, x in step.pop("tensors"))
        groups = []
        for width, at, values, indices, spans in step.pop("groups"):
            group = flat.WidthGroup(width, [flat.Span(*s) for s in spans], value_count=values, index_count=indices)
            group.lay(memory[at : at + group.nbytes])
            groups.append(group)
        files = {name: np.memmap(name, np.uint8, "r") for name in {raw[2] for raw in step["raws"]} if name}
        raws = [
            flat.Raw(name, start, (files[path] if path else memory)[low : low + size].view(f"<u{width}"))
            for name, start, path, low, size, width in step.pop("raws")
        ]
        prepared.manifests.append(Manifest(tensors=tensors, files={}, **step))
        prepared.flat.append(flat.FlatStep(groups, raws, borrowed=True))
    return prepared


# ---- the child -------------------------------------------------------------------------------------------------------


def _decode(stage_dir: Path, processes: int, own: contextlib.ExitStack) -> tuple[dict[str, Any], int]:
    """(what the engine must know, descriptor of the memory that holds all arrays: closed with `own`)"""
    prepared, steps = reading.open_plan(stage_dir)
    layouts, size = [], 0
    for step in steps:
        coded = [c for c in step if c.base is None and c.piece.encoding != "raw"]
        merged = [c for c in step if c.base is not None]
        groups, places = flat.lay_out(
            (c.tensor.name, c.tensor.itemsize, c.piece.start, c.piece.length, c.piece.encoding, c.piece.count)
            for c in coded
        )
        starts = {}
        for width, group in groups.items():
            starts[width], size = size, size + -(-group.nbytes // 8) * 8
        merging = []
        for each in merged:
            merging.append((each, size))
            size += -(-each.piece.length * each.tensor.itemsize // 8) * 8
        layouts.append((coded, groups, places, starts, merging))
    handle = os.memfd_create("astra-decoded", os.MFD_CLOEXEC)
    own.callback(os.close, handle)
    os.ftruncate(handle, size)
    memory = np.frombuffer(mmap.mmap(handle, size), np.uint8) if size else np.zeros(0, np.uint8)
    documents = []
    for manifest, step, (coded, groups, places, starts, merging) in zip(
        prepared.manifests, steps, layouts, strict=True
    ):
        used = [group for group in groups.values() if group.spans]
        for width, group in groups.items():
            group.lay(memory[starts[width] : starts[width] + group.nbytes])
        jobs: Jobs = list(zip(coded, places, strict=True))
        for each, at in merging:
            jobs.append((each, memory[at : at + each.piece.length * each.tensor.itemsize]))
        _fill(jobs, groups, processes)
        documents.append({
            "model": manifest.model, "version": manifest.version, "base_version": manifest.base_version,
            "kind": manifest.kind, "frozen_digests": manifest.frozen_digests,
            "tensors": [(t.name, t.dtype, t.shape, t.encoding, t.count, t.digest) for t in manifest.tensors],
            "groups": [(g.width, starts[g.width], g.value_count, g.index_count, g.spans) for g in used],
            "raws": [
                *((c.tensor.name, c.piece.start, str(c.path), c.piece.offset, c.piece.bytes, c.tensor.itemsize)
                  for c in step if c.piece.encoding == "raw"),
                *((c.tensor.name, 0, "", at, c.piece.length * c.tensor.itemsize, c.tensor.itemsize)
                  for c, at in merging),  # in the memory, not in a file
            ],
        })  # fmt: skip
    doc = {"plan": prepared.plan.decode(), "version": prepared.version, "kind": prepared.kind, "steps": documents}
    doc |= {"base_version": prepared.base_version, "model_path": prepared.model_path, "bytes": prepared.bytes}
    return doc, handle


Jobs = list[tuple[reading.CheckedPiece, flat.Place | np.ndarray[Any, Any]]]
"""A piece, and where in the memory it goes: changes into their groups, whole tensors to a range of bytes."""


def _fill(jobs: Jobs, groups: dict[int, flat.WidthGroup], processes: int) -> None:
    """Decode every piece to its place in the groups' memory, which is shared. Raises WeightCorrupt, or OSError when a
    process ended without a word."""
    sizes = (c.piece.bytes if isinstance(place, flat.Place) else len(place) for c, place in jobs)
    processes = min(processes, sum(sizes) // LEAST_BYTES)
    if processes < 2:
        _fill_here(jobs, groups)
        return
    forks: list[tuple[int, int]] = []
    failed: list[Exception] = []
    try:
        for k in range(processes):
            told, tell = os.pipe()
            try:
                pid = os.fork()
            except OSError:
                os.close(told)
                os.close(tell)
                raise
            if not pid:
                _in_fork(jobs[k::processes], groups, tell)
            os.close(tell)
            forks.append((pid, told))
    finally:
        for pid, told in forks:
            with open(told, "rb") as pipe:
                said = pipe.read().decode()
            status = os.waitpid(pid, 0)[1]
            if said:
                failed.append(WeightCorrupt(said))
            elif status:
                failed.append(OSError(f"a process that decoded ended with {os.waitstatus_to_exitcode(status)}"))
    if failed:
        raise failed[0]


def _in_fork(jobs: Jobs, groups: dict[int, flat.WidthGroup], tell: int) -> NoReturn:
    """The whole life of a forked process."""
    code = 1
    try:
        _fill_here(jobs, groups)
        code = 0
    except (WeightCorrupt, ValueError) as error:
        os.write(tell, str(error).encode())
    finally:
        os._exit(code)  # nothing of the parent's is to be closed or flushed


def _fill_here(jobs: Jobs, groups: dict[int, flat.WidthGroup]) -> None:
    for coded, place in jobs:
        update = reading.decode(coded)
        if isinstance(place, flat.Place):
            flat.fill(groups, place, update)
        else:
            place[:] = update.values.view(np.uint8)


def serve(link: socket.socket, processes: int) -> None:
    """Answer until the engine is gone."""
    while True:
        try:
            request, _ = channel.receive(link)
        except OSError:
            return
        with contextlib.ExitStack() as own:
            doc: dict[str, Any]
            handle: int | None = None
            try:
                doc, handle = _decode(Path(request["stage"]), processes, own)
            except (WeightCorrupt, ValueError) as error:
                doc = {"error": str(error)}
            except OSError as error:  # no memory, no descriptors: not the payload's fault
                doc = {"unable": str(error)}
            try:
                channel.send(link, doc, handle)
            except ConnectionError:  # gone meanwhile; a traceback would stand as its last lines
                return


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, max(1, min(_PROCESSES, (os.cpu_count() or 1) // 2)))
