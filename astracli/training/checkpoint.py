"""Checkpoints of a trainer: fp32 masters, moments, update count, step, version, RNG; for any number of ranks.

    checkpoints/step_000010/   torch.distributed.checkpoint files, meta.json, COMPLETE

A checkpoint is written beside its place and renamed into it when whole; `COMPLETE` lists every file with its size and
its xxh3. A directory without it, or whose files do not match, is no checkpoint. `step_N` is the state after N steps:
training goes on with step N, and the weights are version N. Finding checkpoints does not import torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astracli.errors import RunFailed

if TYPE_CHECKING:
    from astracli.training.fsdp import Ranks
    from astracli.training.optimizer import Masters

FORMAT = 1
COMPLETE = "COMPLETE"
META = "meta.json"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    version: int
    meta: Mapping[str, Any]


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return directory / f"step_{step:06d}"


def find(directory: Path) -> list[Checkpoint]:
    """Every whole checkpoint, oldest first. Incomplete and damaged ones are passed over."""
    if not directory.is_dir():
        return []
    found = [checkpoint for path in directory.iterdir() if (checkpoint := read(path)) is not None]
    return sorted(found, key=lambda c: c.step)


def latest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    if not directory.is_dir():
        return None
    named = [p for p in directory.iterdir() if _NAME.fullmatch(p.name)]
    for path in sorted(named, key=lambda p: int(p.name.split("_")[1]), reverse=True):
        if (checkpoint := read(path)) is not None:
            return checkpoint
    return None


def read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None when it is none, is incomplete or is damaged."""
    match = _NAME.fullmatch(path.name)
    if not match:
        return None
    try:
        files = json.loads((path / COMPLETE).read_text())["files"]
        meta = json.loads((path / META).read_text())
        if meta["format"] != FORMAT or meta["step"] != int(match[1]):
            return None
        whole = all(
            (path / name).stat().st_size == size and _digest(path / name) == digest
            for name, (size, digest) in files.items()
        )
        return Checkpoint(path, int(meta["step"]), int(meta["version"]), meta) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def save(directory: Path, step: int, version: int, masters: Masters, ranks: Ranks, *, keep: int) -> Path:
    """Write the state after `step` steps and drop all but the newest `keep`. A collective. Returns its place."""
    import torch
    import torch.distributed.checkpoint as dcp

    target, working = place(directory, step), directory / f".step_{step:06d}.tmp"
    if ranks.first:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    ranks.barrier()
    first, second = masters.moments()
    state: dict[str, Any] = {f"rng.{ranks.rank}": torch.get_rng_state()}
    for kind, tensors in (("value", masters.values), ("first", first), ("second", second)):
        state |= {f"{kind}.{name}": t for name, t in masters.as_distributed(tensors).items()}
    with masters.whole(), _alone_without_a_word():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(working), no_dist=ranks.world_size == 1)
    ranks.barrier()
    if ranks.first:
        meta = {
            "format": FORMAT,
            "step": step,
            "version": version,
            "updates": masters.updates,
            "world_size": ranks.world_size,
            "names": sorted(masters.values),
        }
        _write(working / META, json.dumps(meta))
        files = {p.name: [p.stat().st_size, _digest(p)] for p in sorted(working.iterdir())}
        _write(working / COMPLETE, json.dumps({"files": files}))
        if target.exists():
            shutil.rmtree(target)
        os.replace(working, target)
        _sync(directory)
        prune(directory, keep)
    ranks.barrier()
    return target


def load(checkpoint: Checkpoint, masters: Masters, ranks: Ranks) -> None:
    """Fill masters, moments and parameters from a checkpoint of whatever number of ranks. A collective.

    Raises RunFailed when it holds other parameters than the model.
    """
    import torch
    import torch.distributed.checkpoint as dcp

    other = set(masters.values) ^ set(checkpoint.meta["names"])
    if other:
        raise RunFailed(
            f"checkpoint `{checkpoint.path}` is of another model: {len(other)} parameters differ, {sorted(other)[:3]}",
            "resume with the run directory's own recipe, or start a new run",
        )
    first, second = masters.no_moments()
    state: dict[str, Any] = {}
    for kind, tensors in (("value", masters.values), ("first", first), ("second", second)):
        state |= {f"{kind}.{name}": t for name, t in masters.as_distributed(tensors).items()}
    rng = f"rng.{ranks.rank}"
    if ranks.rank < int(checkpoint.meta["world_size"]):
        state[rng] = torch.get_rng_state()
    with torch.no_grad(), masters.whole(), _alone_without_a_word():
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=ranks.world_size == 1)
    masters.restore(first, second, int(checkpoint.meta["updates"]))
    if rng in state:
        torch.set_rng_state(state[rng])


@contextmanager
def _alone_without_a_word() -> Iterator[None]:
    """One rank needs no process group; torch warns about its absence all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    named = sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name.split("_")[1]))
    for old in named[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in directory.glob(".step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make a rename in `directory` last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
