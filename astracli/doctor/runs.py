"""What our own dead runs left behind: directories, and processes that outlived their supervisor."""

from __future__ import annotations

from collections.abc import Iterator

from astracli.doctor.subject import Check, Subject
from astracli.machine.memory import words

GROUP = "runs"
SHOWN = 5


def checks(subject: Subject) -> Iterator[Check]:
    """Never a failure: a new run takes a new directory, and a dead one can still be resumed."""
    left = subject.facts.runs
    if not left:
        yield Check("dead runs", GROUP, "ok", "none under runs/")
        return
    for run in left[:SHOWN]:
        processes = ", ".join(f"{module} (process {pid})" for pid, module in run.processes.items())
        value = f"{run.path} stopped at step {run.step}, holds {words(run.bytes)}"
        why = f"still running: {processes}" if processes else "its supervisor was killed; it can be resumed"
        fix = f"`astra train --resume {run.path}`, or free its disk: `astra runs clean {run.path}`"
        yield Check("dead runs", GROUP, "warn", value, why, fix)
    if len(left) > SHOWN:
        total = words(sum(run.bytes for run in left[SHOWN:]))
        fix = "`astra runs clean --resumable --older-than 0`"
        yield Check("dead runs", GROUP, "warn", f"{len(left) - SHOWN} more, {total}", "they hold disk", fix)
