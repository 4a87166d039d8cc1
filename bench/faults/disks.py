"""Full disks, no inodes, disks that turn read-only, limits on file sizes and on open files, in the middle of a run."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from loop.kill_resume import Attempt

from faults.world import Row, World, attempted, phase, victim

MIB = 2**20
DISK_MIB = 256
FULL = (r"is full", r"limit on file sizes", r"disk I/O error")
READ_ONLY = (r"the file system cannot be written any more",)
FILES = (r"open files", r"no more files", r"[Tt]oo many open files", r"unable to open database file")


@contextmanager
def disk(path: Path, *, kind: str = "tmpfs") -> Iterator[Path]:
    """A file system of its own at `path`, for root: in memory, or `ext4` in a file, which can be made to fail."""
    path.mkdir()
    if kind == "tmpfs":
        _root("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,nr_inodes=4000", "tmpfs", str(path))
    else:
        image = path.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(DISK_MIB * MIB)
        _root("mkfs.ext4", "-q", str(image))
        _root("mount", "-o", "loop,errors=remount-ro", str(image), str(path))
    try:
        yield path
    finally:
        _root("umount", "-l", str(path))


def _root(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def can_mount() -> bool:
    return os.geteuid() == 0 and Path("/proc/self/mounts").exists()


# ---- faults; each returns how it is undone


def fill(place: Path, free: int) -> Callable[[], None]:
    """Take all space but `free` bytes."""
    ballast = place / ".ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\1" * MIB)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    size = ballast.stat().st_size
    os.truncate(ballast, max(0, size - free))
    return ballast.unlink


def take_inodes(place: Path, free: int) -> Callable[[], None]:
    """Leave `free` inodes."""
    folder = place / ".inodes"
    folder.mkdir()
    names: list[Path] = []
    try:
        while True:
            names.append(folder / str(len(names)))
            names[-1].touch()
    except OSError:
        names.pop()
    for name in names[len(names) - free :]:
        name.unlink()

    def undo() -> None:
        for name in folder.iterdir():
            name.unlink()
        folder.rmdir()

    return undo


def fail_device(place: Path) -> Callable[[], None]:
    """An error of the device: ext4 makes itself read-only, also for files that are open."""
    _root("sync", "-f", str(place))  # what was not on the disk yet is lost with it
    source = subprocess.check_output(["findmnt", "-no", "SOURCE", str(place)], text=True).strip()
    (Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error").write_text("1\n")

    def undo() -> None:
        _root("umount", "-l", str(place))
        subprocess.run(["e2fsck", "-fy", str(place.with_suffix(".img"))], capture_output=True)
        _root("mount", "-o", "loop,errors=remount-ro", str(place.with_suffix(".img")), str(place))

    return undo


def limit(attempt: Attempt, name: str, kind: int, value: int) -> Callable[[], None]:
    """On one process that runs."""
    found = victim(attempt, name)
    assert found is not None, f"no {name}"
    resource.prlimit(found.pid, kind, (value, value))
    return lambda: None


# ---- rows


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    make: Callable[[Attempt, Path], Callable[[], None]]
    """(attempt, where its run lies) -> how it is undone"""
    causes: tuple[str, ...]
    disk: str | None = None
    """A file system of its own that it needs."""


@dataclass(frozen=True)
class Moment:
    phase: str
    steps: int

    def __str__(self) -> str:
        return f"{self.phase}, {self.steps} steps"


def drawn(draw: Random) -> list[Fault]:
    """One of each kind."""
    free = draw.choice((0, 3_000, 20_000, 100_000, 400_000, 2_000_000))
    inodes = draw.choice((0, 1, 2, 5, 9))
    who = draw.choice(("supervisor", "trainer", "rollout", "engine0", "eval"))
    size = draw.choice((1_000, 100_000, 300_000, 1_000_000))
    return [
        Fault("full disk", f"{free} bytes free", lambda _, place: fill(place, free), FULL, "tmpfs"),
        Fault("no inodes", f"{inodes} free", lambda _, place: take_inodes(place, inodes), FULL, "tmpfs"),
        Fault("read-only disk", "by an error of its device", lambda _, place: fail_device(place), READ_ONLY, "ext4"),
        Fault("limit on file sizes", f"{who}, {size} bytes",
              lambda attempt, _: limit(attempt, who, resource.RLIMIT_FSIZE, size), FULL),
        Fault("limit on open files", f"{who}, 3", lambda attempt, _: limit(attempt, who, resource.RLIMIT_NOFILE, 3),
              FILES),
    ]  # fmt: skip


def at(world: World, name: str, moment: Moment, fault: Fault, row: Row) -> Row:
    """A run, on a disk of its own where the fault needs one; the fault, its end, and the resume once it is undone."""
    place = world.folder / name
    if fault.disk is None:
        place.mkdir()
        return _at(world, place, moment, fault, row)
    with disk(place, kind=fault.disk):
        return _at(world, place, moment, fault, row)


def _at(world: World, place: Path, moment: Moment, fault: Fault, row: Row) -> Row:
    run = place / "run"
    attempt = world.start(run, 10)
    undo: list[Callable[[], None]] = []

    def strikes() -> bool:
        if phase(attempt) != moment.phase or len(attempt.steps()) < moment.steps:
            return False
        if victim(attempt, "eval") is None:  # the last to be started
            return False
        undo.append(fault.make(attempt, place))
        return True

    struck = attempt.wait(strikes, 200.0)
    row = world.judge(row, attempt, fault.causes, can_write=fault.disk != "ext4")
    if not struck:
        row.outcome = f"not met, {row.outcome}"
    for each in undo:
        each()
    return world.finish(run, row)


MOMENTS = (Moment("starting", 0), Moment("training", 1), Moment("training", 3), Moment("training", 6),
           Moment("finishing", 0))  # fmt: skip


def rows(world: World, moments: int, kinds: Sequence[str]) -> list[Row]:
    """`moments`: how many of each kind of fault, at random moments."""
    found = []
    for number in range(moments):
        for place, fault in enumerate(drawn(world.draw)):
            if fault.name.replace(" ", "-") not in kinds or (fault.disk and not can_mount()):
                continue
            moment = world.draw.choice(MOMENTS)
            row = Row(fault.name, f"{moment}; {fault.what}")
            found.append(attempted(row, partial(at, world, f"disk{number}_{place}", moment, fault)))
    return found


KINDS = tuple(fault.name.replace(" ", "-") for fault in drawn(Random(0)))
