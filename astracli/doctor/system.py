"""Cores, memory, disk, shared memory, open files, locked memory: what containers are usually too tight in."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from astracli.doctor.subject import Check, Status, Subject
from astracli.machine.memory import words

GROUP = "system"
GIB = 2**30
NCCL_SHM = 256 * 2**20
"""Ranks of one host that share no GPU link talk through /dev/shm, several buffers a channel and pair."""
EASY_SHM = {False: 64 * 2**20, True: GIB}
EASY_FILES = 4096
RDMA_MEMLOCK = 64 * 2**20


def checks(subject: Subject) -> Iterator[Check]:
    box = subject.facts.system
    cores, memory, disk = box.cores_usable, box.memory_available, box.disk_free
    yield _least("cpu cores", cores, 2, f"{cores:g} usable of {box.cores}", "engine and trainer want one each", "")
    why, fix = "a run of the tiny recipe takes about 3 GiB", "end other programs, or raise the container's limit"
    yield _least("memory", memory, 3 * GIB, f"{words(memory)} available of {words(box.memory_total)}", why, fix)
    why, fix = "checkpoints and published weights need room", "point --run-dir at a larger disk"
    yield _least("disk", disk, 2 * GIB, f"{words(disk)} free at {box.disk_path}", why, fix)
    yield _files(subject)
    yield _shm(subject)
    yield _memlock(subject)


def _least(name: str, value: float, least: float, shown: str, why: str, fix: str) -> Check:
    """`warn` below `least`: whether a recipe fits is for its plan to say."""
    if value < least:
        return Check(name, GROUP, "warn", shown, why, fix)
    return Check(name, GROUP, "ok", shown)


def files_needed(subject: Subject) -> int:
    """Open files of the busiest process, an engine: a connection for each group and each evaluation item in flight
    (the samples of one travel together), over what Python with torch has open anyway. The tiny recipe was measured at
    72 of the 162 that this gives."""
    recipe = subject.recipe
    if recipe is None:
        return 0
    groups = (recipe.effective_staleness + 1) * recipe.train.batch_groups
    return 50 + groups + (ceil(recipe.evaluation_requests / recipe.eval.pass_k) if recipe.eval.every else 0)


def _files(subject: Subject) -> Check:
    have, hard, need = subject.facts.system.nofile, subject.facts.system.nofile_hard, files_needed(subject)
    why = "every group and evaluation item in flight holds a connection" + (f": up to {need} files" if need else "")
    if have < 0 or have >= max(need, EASY_FILES):
        return Check("open files", GROUP, "ok", "unlimited" if have < 0 else str(have))
    raisable = hard < 0 or hard >= max(need, EASY_FILES)
    fix = "`ulimit -n 65536` before the run" if raisable else "start the container with `--ulimit nofile=65536:65536`"
    return Check("open files", GROUP, subject.bad(have < need), str(have), why, fix)


def _shm(subject: Subject) -> Check:
    size = subject.facts.system.shm_total
    if size is None:
        return Check("shared memory", GROUP, "skip", "none on this system")
    if size >= EASY_SHM[subject.cuda]:
        return Check("shared memory", GROUP, "ok", f"{words(size)} at /dev/shm")
    recipe = subject.recipe
    ranks = recipe.resources.train_gpus if recipe is not None and subject.cuda else 1
    why = "processes that hand each other tensors do it there, and die when it is full"
    if ranks > 1:
        why = f"NCCL puts the buffers of {ranks} trainer ranks there and dies with `unable to allocate shared memory`"
    status: Status = subject.bad(ranks > 1 and size < NCCL_SHM)
    return Check(
        "shared memory", GROUP, status, f"{words(size)} at /dev/shm", why, "start the container with `--shm-size=8g`"
    )


def _memlock(subject: Subject) -> Check:
    have, recipe = subject.facts.system.memlock, subject.recipe
    shown = "unlimited" if have < 0 else words(have)
    if 0 <= have < RDMA_MEMLOCK and subject.cuda and recipe is not None and recipe.resources.train_gpus > 1:
        why = "NCCL locks memory when it finds InfiniBand, and fails to register it under a small limit"
        fix = "`ulimit -l unlimited`, in a container `--ulimit memlock=-1`"
        return Check("locked memory", GROUP, "warn", shown, why, fix)
    return Check("locked memory", GROUP, "ok", shown)
