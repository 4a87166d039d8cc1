"""GPUs, driver, whether torch was built for them, and who else is on them."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Status, Subject
from astracli.machine.facts import version_tuple
from astracli.machine.memory import words
from astracli.plan.memory import on_gpu

GROUP = "gpu"
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA major version that torch was built for -> first driver that runs it."""
FIRST_CUDA = {(8, 9): (11, 8), (9, 0): (11, 8), (10, 0): (12, 8), (12, 0): (12, 8)}
"""Compute capability, from here on -> first CUDA that has code for it."""
IDLE = 1024 * 2**20
"""Memory that a GPU without any work may have taken: driver, display, MPS."""
GPU_BUILD = "install a CUDA build of torch: `pip install -c constraints/cuda.txt 'astracli[gpu]'`"


def checks(subject: Subject) -> Iterator[Check]:
    facts, bad = subject.facts, subject.bad(subject.cuda)
    if facts.gpu_error:
        fix = "mend the NVIDIA driver: `nvidia-smi` must answer"
        yield Check("gpus", GROUP, bad, "nvidia-smi fails", facts.gpu_error, fix)
        return
    visible, there = facts.visible_gpus, facts.gpus
    if not visible:
        hidden = f"{len(there)} hidden by CUDA_VISIBLE_DEVICES" if there else "none"
        yield Check("gpus", GROUP, "skip", hidden)  # a recipe that wants some says so in its own group
        if subject.cuda and facts.torch_cuda is None:
            # Without a GPU in the machine no other torch would help: that is what the recipe's own group says.
            status: Status = "fail" if there else "skip"
            why, fix = ("the recipe trains on GPUs", GPU_BUILD) if there else ("", "")
            yield Check("torch for gpus", GROUP, status, "a CPU build", why, fix)
        return
    first = visible[0]
    size = f", {words(first.memory_total)}" if first.memory_total else ""
    shown = f"{len(visible)} x {first.name} ({first.compute_capability}{size})"
    names = sorted({gpu.name for gpu in visible})
    if len(names) > 1:
        why = "ranks of one run wait for the slowest, and kernels are chosen for the oldest"
        fix = "choose equal ones with CUDA_VISIBLE_DEVICES"
        yield Check("gpus", GROUP, "warn", f"{len(visible)}: {', '.join(names)}", why, fix)
    else:
        yield Check("gpus", GROUP, "ok", shown)
    yield from _software(subject, bad)
    yield from _taken(subject)


def _software(subject: Subject, bad: Status) -> Iterator[Check]:
    facts = subject.facts
    gpus, built = facts.visible_gpus, facts.torch_cuda
    if built is None:
        yield Check("torch for gpus", GROUP, bad, "a CPU build", "torch cannot use these GPUs", GPU_BUILD)
        return
    cuda, capability = version_tuple(built), max(gpu.capability for gpu in gpus)
    first = max((need for start, need in FIRST_CUDA.items() if capability >= start), default=(0, 0))
    dotted = ".".join(map(str, capability))
    if cuda < first:
        why = f"compute capability {dotted} has code from CUDA {'.'.join(map(str, first))} on"
        yield Check("torch for gpus", GROUP, bad, f"built for CUDA {built}", why, GPU_BUILD)
    else:
        yield Check("torch for gpus", GROUP, "ok", f"built for CUDA {built}, which has code for {dotted}")
    least, driver = OLDEST_DRIVER.get(cuda[0], 0), gpus[0].driver
    number = version_tuple(driver)
    if number and number[0] < least:
        fix = f"update the driver to {least} or newer, or install torch for an older CUDA"
        yield Check("driver", GROUP, bad, driver, f"CUDA {built} needs {least} or newer", fix)
    else:
        yield Check("driver", GROUP, "ok", f"{driver} (CUDA {built} needs {least} or newer)" if least else driver)


def _taken(subject: Subject) -> Iterator[Check]:
    """Other processes on the GPUs that the recipe would use: named, and left alone."""
    plan = subject.plan
    if subject.recipe is not None and not subject.cuda:
        yield Check("gpus in use", GROUP, "ok", "the recipe uses none")
        return
    mine = plan.gpu_map if plan is not None and subject.cuda else {}
    used = {gpu.index: names for gpu, names in mine.items() if gpu.host == subject.host}
    every = subject.facts.visible_gpus
    gpus = [gpu for gpu in every if gpu.index in used] if used else every
    busy = False
    for gpu in gpus:
        total, free = gpu.memory_total, gpu.memory_free
        taken = total - free if total is not None and free is not None else 0
        if not gpu.processes and taken <= IDLE:
            continue
        busy = True
        who = ", ".join(f"{p.name} (process {p.pid})" for p in gpu.processes)
        who = who or "processes that cannot be seen from here"
        names = used.get(gpu.index, [])
        need = on_gpu(plan.memory, names, fixed=True) if plan and names else 0
        tight = free is not None and need > free
        value = f"GPU {gpu.index}: {words(taken)} taken by {who}"
        why = f"the recipe needs at least {words(need)} there" if need else "memory and speed are shared with them"
        fix = "wait for them or end them yourself (astra ends nothing that it did not start), or choose other GPUs"
        fix += " with CUDA_VISIBLE_DEVICES"
        yield Check("gpus in use", GROUP, subject.bad(tight), value, why, fix)
    if not busy:
        yield Check("gpus in use", GROUP, "ok", "nobody else is on them")
