"""How long a host takes to join a run: from the command to the first group that is leased to it.

    python bench/loop/joining.py [--times 2] [--seed 0]

The run is the tiny recipe on this machine; `astra agent` starts with the token of hosts that join later, on a loopback
address. Prints when the agent had joined, when its processes were started, when its engine was ready and when its
worker had its first lease, in seconds since the command; and the processor seconds that the agent and its processes had
used by then, which a busy machine does not change: `load` is the machine's. Exits 1 when the processor seconds, which
two idle cores would spend in less time, are over 10.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from os import getloadavg
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.agents import Hosts
from shared import folder, options, show

from loop.kill_resume import SMALL

TARGET_S = 10.0


def joined(place: Path, number: int) -> dict[str, Any]:
    hosts = Hosts(place / f"run{number}", [*SMALL, "eval.every=0", "resources.engines=1"], names=())
    assert hosts.attempt.wait(lambda: len(hosts.attempt.steps()) >= 2, 300), hosts.said()
    began = time.monotonic()
    hosts.give("x", "--name", "x", "--address", "127.0.1.1")
    agent, folder_of = psutil.Process(hosts.agents["x"].pid), place / f"run{number}-x0"
    log, found = folder_of.with_suffix(".log"), {}

    def leased() -> bool:
        with suppress(sqlite3.Error), sqlite3.connect(f"file:{hosts.run}/hub.sqlite?mode=ro", uri=True) as hub:
            return bool(hub.execute("SELECT COUNT(*) FROM groups WHERE worker = 'rollout1'").fetchone()[0])
        return False

    marks: dict[str, Callable[[], bool]] = {
        "joined_s": lambda: "joined run" in log.read_text(),
        "started_s": lambda: (folder_of / "config" / "rollout1.json").exists(),
        "engine_up_s": lambda: (folder_of / "stage" / "engine1" / "watching.json").exists(),
        "first_lease_s": leased,
    }
    for mark, there in marks.items():
        while not there():
            assert hosts.attempt.supervisor.poll() is None and time.monotonic() - began < 300, hosts.said()
            time.sleep(0.01)
        found[mark] = time.monotonic() - began
    found["cpu_s"] = sum(cpu(process) for process in (agent, *agent.children(recursive=True)))
    hosts.attempt.supervisor.terminate()
    hosts.end()
    return {**found, "load": getloadavg()[0]}


def cpu(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        spent = process.cpu_times()
        return float(spent.user + spent.system)
    return 0.0


def main() -> None:
    args = options(__doc__, times=2, seed=0).parse_args()
    with folder() as name:
        rows = [joined(name, number) for number in range(args.times)]
    show(args, {"asked_under_s": TARGET_S, "joins": rows})
    sys.exit(any(row["cpu_s"] > TARGET_S for row in rows))


if __name__ == "__main__":
    main()
