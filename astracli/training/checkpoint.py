"""Checkpoints of a trainer: fp32 masters, moments, update count, step, RNG; for any number of ranks.

    checkpoints/step_000010/   rank_0.bin, rank_0.json, ..., meta.json, COMPLETE

`rank_R.bin` holds what rank R holds, tensor behind tensor, and `rank_R.json` says where: kind, name, dtype, and which
range of the flattened tensor. A checkpoint is written beside its place (`checkpoint_saver`) and renamed into it when
whole; `COMPLETE` lists every file with its size and its xxh3. A directory without it, or whose files do not match, is
no checkpoint. `step_N` is the state after N steps: training goes on with step N, and the weights are version N.
Finding checkpoints does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from astracli.config import reading
from astracli.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor

    from astracli.training.fsdp import Ranks
    from astracli.training.optimizer import Masters

FORMAT = 2
COMPLETE = "COMPLETE"
META = "meta.json"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    meta: Mapping[str, Any]


class Entry(NamedTuple):
    """A range of a flattened tensor in a rank's file."""

    kind: str
    """`value`, or the split master `high` and `rest`; `first` and `second` moment; `rng`."""
    name: str
    """Of the parameter; of a random state its rank."""
    dtype: str
    start: int
    """In the whole tensor, elements."""
    length: int
    offset: int
    """In the file, bytes."""


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return directory / f"step_{step:06d}"


def _named(directory: Path) -> list[Path]:
    """What is named like a checkpoint, oldest first."""
    named = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def find(directory: Path) -> list[Checkpoint]:
    """Every whole checkpoint, oldest first. Incomplete and damaged ones are passed over."""
    return [checkpoint for path in _named(directory) if (checkpoint := read(path)) is not None]


def latest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    return next((checkpoint for path in reversed(_named(directory)) if (checkpoint := read(path)) is not None), None)


def damaged(directory: Path) -> list[int]:
    """Steps of checkpoints newer than the newest whole one, newest first: a checkpoint gets its name when it is whole,
    so these were harmed since."""
    steps = []
    for path in reversed(_named(directory)):
        if read(path) is not None:
            break
        steps.append(int(path.name.removeprefix("step_")))
    return steps


def read(path: Path, *, digests: bool = True) -> Checkpoint | None:
    """The checkpoint at `path`, or None when it is none, is incomplete or is damaged. Without `digests` only sizes are
    compared, for a caller that knows that its bytes are right. Raises RunFailed for another format."""
    match = _NAME.fullmatch(path.name)
    if not match:
        return None
    try:
        files = reading.document(path / COMPLETE)["files"]
        meta = reading.document(path / META)
        if meta["format"] != FORMAT:
            raise RunFailed(
                f"checkpoint `{path}` has format {meta['format']}, this astra reads {FORMAT}",
                "resume the run with the version of astra that made it",
            )
        if meta["step"] != int(match[1]):
            return None
        whole = all(
            (path / name).stat().st_size == size and (not digests or digest_of(path / name) == digest)
            for name, (size, digest) in files.items()
        )
        return Checkpoint(path, int(meta["step"]), meta) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_of(path: Path) -> str:
    import xxhash

    with reading.opened(path) as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def seal(directory: Path, step: int) -> int | None:
    """A number from 1 that stands for the content of the checkpoint of `step`; None when it is not there, or not
    whole."""
    try:
        return int(digest_of(place(directory, step) / COMPLETE)[:15], 16) + 1
    except OSError:
        return None


def save(directory: Path, step: int, masters: Masters, ranks: Ranks, *, keep: int) -> Path:
    """Write the state after `step` steps, now, and drop all but the newest `keep`. A collective. Returns its place."""
    from astracli.training.checkpoint_saver import Saver

    saver = Saver(directory, ranks, keep=keep, beside=False)
    saver.begin(step, masters)
    saver.wait()
    ranks.barrier()
    return place(directory, step)


def load(checkpoint: Checkpoint, masters: Masters, ranks: Ranks) -> None:
    """Fill masters, moments and parameters from a checkpoint of whatever number of ranks.

    Raises RunFailed when it holds other parameters than the model.
    """
    import torch

    other = set(masters.values) ^ set(checkpoint.meta["names"])
    if other:
        raise RunFailed(
            f"checkpoint `{checkpoint.path}` is of another model: {len(other)} parameters differ, {sorted(other)[:3]}",
            "resume with the run directory's own recipe, or start a new run",
        )
    base, given = checkpoint.meta.get("base") or {}, masters.origin.get("base") or {}
    if base.get("fingerprint") != given.get("fingerprint"):
        raise RunFailed(
            f"checkpoint `{checkpoint.path}` holds adapters of `{base['path']}` as it was then; the weights of "
            f"`{given['path']}` are others",
            "put that model back: adapters mean nothing without it",
        )
    stored = _Stored(checkpoint)
    with torch.no_grad():
        for name, value in masters.values.items():
            where = (name, masters.start(name), value.numel())
            with masters.split_masters.whole([name]):
                value.copy_(stored.master(*where).view(value.shape))
            first, second = (stored.read(kind, *where).view(value.shape) for kind in ("first", "second"))
            masters.adam.restore(name, first, second, int(checkpoint.meta["updates"]))
    masters.restored()
    if ranks.rank < int(checkpoint.meta["world_size"]):
        torch.set_rng_state(stored.read("rng", str(ranks.rank), 0, len(torch.get_rng_state())))


class _Stored:
    """Ranges of tensors, from the files of all ranks."""

    def __init__(self, checkpoint: Checkpoint):
        self._path = checkpoint.path
        self._entries: dict[tuple[str, str], list[tuple[Path, Entry]]] = defaultdict(list)
        for rank in range(int(checkpoint.meta["world_size"])):
            for entry in map(Entry._make, json.loads((self._path / f"rank_{rank}.json").read_text())["tensors"]):
                self._entries[entry.kind, entry.name].append((self._path / f"rank_{rank}.bin", entry))

    def master(self, name: str, start: int, length: int) -> Tensor:
        """fp32 [length], whether it was stored whole or split."""
        import torch

        from astracli.training.split_masters import join

        if ("value", name) in self._entries or not length:
            return self.read("value", name, start, length)
        high, rest = (self.read(kind, name, start, length) for kind in ("high", "rest"))
        master = torch.empty(length, dtype=torch.float32)
        join(high, rest, master)
        return master

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """[length] elements from `start` on. Raises RunFailed when some of them are nowhere."""
        import numpy as np
        import torch

        found = self._entries.get((kind, name), [])
        dtype = getattr(torch, found[0][1].dtype) if found else torch.float32
        result, missing = torch.empty(length, dtype=dtype), length
        for path, entry in found:
            low, high = max(start, entry.start), min(start + length, entry.start + entry.length)
            if low < high:
                size, skipped = (high - low) * dtype.itemsize, (low - entry.start) * dtype.itemsize
                target = result[low - start : high - start].view(torch.uint8).numpy()
                target[:] = np.fromfile(path, np.uint8, size, offset=entry.offset + skipped)
                missing -= high - low
        if missing:
            raise RunFailed(f"checkpoint `{self._path}` lacks {missing} elements of `{name}` ({kind})")
        return result


def prune(directory: Path, keep: int, kept: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `kept`, and what an interrupted save left
    behind."""
    stay = {place(directory, step) for step in kept}
    old_ones = [old for old in _named(directory)[:-keep] if old not in stay]
    for old in (*old_ones, *directory.glob(".step_*.tmp")):
        shutil.rmtree(old, ignore_errors=True)


def sync(directory: Path) -> None:
    """Make a rename in `directory` last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
