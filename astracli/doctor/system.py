"""The host: its sizes and limits (containers are often too tight), its Python, and what dead runs left on it."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from astracli.doctor.subject import Check, Subject, flaw
from astracli.machine.facts import version_tuple
from astracli.machine.memory import words

GROUP = "system"
PYTHON = "python"
GIB = 2**30
NCCL_SHM = 256 * 2**20
"""Ranks of one host that share no GPU link talk through /dev/shm, several buffers a channel and pair."""
EASY_SHM = {False: 64 * 2**20, True: GIB}
EASY_FILES = 4096
RDMA_MEMLOCK = 64 * 2**20
OLDEST_PYTHON = (3, 11)
CORE = {
    "torch": (2, 11),
    "transformers": (5, 8),
    "safetensors": (0, 5),
    "numpy": (2,),
    "datasets": (4,),
    "math-verify": (0, 9),
    "pydantic": (2, 9),
    "typer": (0, 16),
}
"""What every run imports, and from which version on."""
SHOWN_RUNS = 5


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
    enough = max(need, EASY_FILES)
    if have < 0 or have >= enough:
        return Check("open files", GROUP, "ok", "unlimited" if have < 0 else str(have))
    raisable = hard < 0 or hard >= enough
    fix = "`ulimit -n 65536` before the run" if raisable else "start the container with `--ulimit nofile=65536:65536`"
    return Check("open files", GROUP, subject.bad(have < need), str(have), why, fix)


def _ranks(subject: Subject) -> int:
    """Trainer ranks on GPUs that the recipe asks for."""
    return subject.recipe.resources.train_gpus if subject.recipe is not None and subject.cuda else 0


def _shm(subject: Subject) -> Check:
    size, ranks = subject.facts.system.shm_total, _ranks(subject)
    if size is None:
        return Check("shared memory", GROUP, "skip", "none on this system")
    shown = f"{words(size)} at /dev/shm"
    if size >= EASY_SHM[subject.cuda]:
        return Check("shared memory", GROUP, "ok", shown)
    why = "processes that hand each other tensors do it there, and die when it is full"
    if ranks > 1:
        why = f"NCCL puts the buffers of {ranks} trainer ranks there and dies with `unable to allocate shared memory`"
    status = subject.bad(ranks > 1 and size < NCCL_SHM)
    return Check("shared memory", GROUP, status, shown, why, "start the container with `--shm-size=8g`")


def _memlock(subject: Subject) -> Check:
    have = subject.facts.system.memlock
    enough = RDMA_MEMLOCK if have >= 0 and _ranks(subject) > 1 else have
    why = "NCCL locks memory when it finds InfiniBand, and fails to register it under a small limit"
    fix = "`ulimit -l unlimited`, in a container `--ulimit memlock=-1`"
    return _least("locked memory", have, enough, "unlimited" if have < 0 else words(have), why, fix)


def python(subject: Subject) -> Iterator[Check]:
    facts = subject.facts
    version, executable = facts.python.version, facts.python.executable
    if version_tuple(version) < OLDEST_PYTHON:
        fix = "make a virtual environment with a newer one: `python3.12 -m venv .venv`"
        yield Check("python", PYTHON, "fail", version, "astra needs 3.11 or newer", fix)
    else:
        yield Check("python", PYTHON, "ok", f"{version} at {executable}")
    for name, least in CORE.items():
        yield _core(subject, name, least)


def _core(subject: Subject, name: str, least: tuple[int, ...]) -> Check:
    oldest = ".".join(map(str, least))
    fix = f"`pip install '{name}>={oldest}'`"
    if (wrong := flaw(subject.facts, name)) is not None:
        return Check(name, PYTHON, "fail", wrong.value, f"every run imports it; it is {wrong.why}", wrong.fix)
    if not subject.facts.usable(name):
        return Check(name, PYTHON, "fail", "not importable", "every run imports it", fix)
    version = str(subject.facts.package(name).version)
    if subject.facts.version_of(name) < least:
        return Check(name, PYTHON, "fail", version, f"needs {oldest} or newer", fix)
    return Check(name, PYTHON, "ok", version)


def runs(subject: Subject) -> Iterator[Check]:
    """What dead runs of ours left. Never a failure: a new run takes a new directory, a dead one can be resumed."""
    left = subject.facts.runs
    if not left:
        yield Check("dead runs", "runs", "ok", "none under runs/")
        return
    for run in left[:SHOWN_RUNS]:
        processes = ", ".join(f"{module} (process {pid})" for pid, module in run.processes.items())
        value = f"{run.path} stopped at step {run.step}, holds {words(run.bytes)}"
        why = f"still running: {processes}" if processes else "its supervisor was killed; it can be resumed"
        fix = f"`astra train --resume {run.path}`, or free its disk: `astra runs clean {run.path}`"
        yield Check("dead runs", "runs", "warn", value, why, fix)
    if len(left) > SHOWN_RUNS:
        total = words(sum(run.bytes for run in left[SHOWN_RUNS:]))
        fix = "`astra runs clean --resumable --older-than 0`"
        yield Check("dead runs", "runs", "warn", f"{len(left) - SHOWN_RUNS} more, {total}", "they hold disk", fix)
