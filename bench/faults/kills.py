"""SIGKILL, SIGTERM and SIGSTOP for every process of a run, in every phase."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults.world import Row, World, attempted, phase, victim

WORKERS = ("engine0", "rollout", "trainer", "eval")
VICTIMS = ("supervisor", *WORKERS, "grader", "guard", "fork_server")
PHASES = ("starting", "training", "finishing", "stopping")
SIGNALS = ("KILL", "TERM", "STOP")
HEARTBEAT_S = 60.0
"""`launch.heartbeat_timeout_s`: a worker that is silent for longer is given up."""
STEPS = 5
"""Of an attempt; its first evaluation and its last take two seconds each."""


@dataclass(frozen=True)
class Fault:
    process: str
    phase: str
    signal: str


def faults(victims: Sequence[str], phases: Sequence[str], signals: Sequence[str]) -> list[Fault]:
    return [Fault(process, when, name) for process in victims for when in phases for name in signals]


def strike(world: World, name: str, chosen: Sequence[Fault], stop_s: float) -> list[Row]:
    """All of them in one run: an attempt each, which goes on where the one before ended. The last row is the books."""
    run = world.folder / name
    rows = []
    for fault in chosen:
        row = Row(f"SIG{fault.signal}", f"{fault.process}, {fault.phase}")
        rows.append(attempted(row, partial(_one, world, run, fault, stop_s)))
    return [*rows, attempted(Row("none", f"books after {len(chosen)} attempts"), lambda row: world.finish(run, row))]


def _one(world: World, run: Path, fault: Fault, stop_s: float, row: Row) -> Row:
    attempt = world.start(run, STEPS)
    pause_s = world.draw.uniform(0.0, 0.6 if fault.phase == "training" else 0.3)

    def strikes() -> bool:
        if phase(attempt) != fault.phase or (found := victim(attempt, fault.process)) is None:
            return False
        time.sleep(pause_s if fault.phase != "stopping" else 0.0)
        try:
            os.kill(found.pid, getattr(signal, f"SIG{fault.signal}"))
        except ProcessLookupError:
            return False
        if fault.signal == "STOP":
            time.sleep(stop_s)
            try:
                found.resume()
            except Exception:  # it was given up meanwhile, and killed
                row.said = "gone before SIGCONT"
        return True

    struck = attempt.wait(strikes, 300.0)
    child = fault.process in WORKERS
    causes = [f"`{fault.process}`"] if child else []
    row = world.judge(row, attempt, causes, limit_s=240.0)
    if not struck:
        row.outcome = f"not met, {row.outcome}"
        return row
    row.problems += _expected(fault, row, stop_s)
    return row


def _expected(fault: Fault, row: Row, stop_s: float) -> list[str]:
    """What else than `finished` this fault may come to. A process that stands still for less than the limits allow, a
    grader or a fork server that is gone cost nothing but time."""
    ends = {"finished"}
    if fault.phase != "stopping" and fault.process in WORKERS and fault.signal != "STOP":
        ends = {"ended, exit 1"}
    if fault.process == "supervisor" and fault.signal != "STOP":
        ends = {"killed"} if fault.signal == "KILL" else {"interrupted"}
        if fault.phase == "stopping":
            ends |= {"finished", "interrupted"}  # it came after everything was done
    if fault.signal == "STOP" and fault.process in WORKERS and stop_s > HEARTBEAT_S - 5:
        ends |= {"ended, exit 1"}
    return [] if row.outcome in ends else [f"expected {sorted(ends)}"]
