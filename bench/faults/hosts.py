"""A run over three hosts whose agents are lost at random moments and start again; then the books.

    python bench/faults/hosts.py [--losses 4] [--ways kill freeze term] [--seed 0] [--steps 60] [--run-dir DIR]

The hosts are loopback addresses of this machine. `kill`: kill -9 of the agent. `freeze`: SIGSTOP for longer than its
lease, then SIGCONT, as of a partition that heals too late. `hold`: SIGSTOP for half its lease, after which it goes on.
`term`: it is told to leave. A host whose agent is gone gets another with the new token file. At the end the run must
have lost no group, trained none twice, have one evaluation for every step at which one became due, and nothing must be
left running on any host. Prints a row for each loss and a line per rule; exits 1 when a rule is broken.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.books import check_files, check_hub
from loop.kill_resume import EVERY, ITEMS, SMALL, Attempt
from shared import ASTRA, folder, options, show, start

WAYS = ("kill", "freeze", "hold", "term")
LEASE_S = 5.0
HOSTS = {"b": "127.0.0.2", "c": "127.0.0.3"}
PORT = 18473


@dataclass
class Hosts:
    """A run, and the agents of its hosts."""

    run: Path
    attempt: Attempt
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    made: list[int] = field(default_factory=list)

    def give(self, host: str) -> None:
        """Start an agent on a host, as soon as its token file is there."""
        token = self.run / "agents" / f"{host}.token"
        assert self.attempt.wait(token.exists), self.attempt.end()[1]
        place = self.run.parent / f"{host}{len(self.made)}"
        words = [*ASTRA, "agent", f"http://127.0.0.1:{PORT}", "--token-file", str(token)]
        words += ["--address", HOSTS[host], "--dir", str(place)]
        self.agents[host] = start(words, self.run.parent, place.with_suffix(".log"), apart=True)
        self.made.append(self.agents[host].pid)

    def lose(self, host: str, way: str) -> dict[str, Any]:
        """One loss, and what follows. -> when it was, and how the agent ended."""
        agent, step = self.agents[host], max(self.attempt.steps(), default=-1)
        below = psutil.Process(agent.pid).children(recursive=True)
        if way == "hold":
            os.kill(agent.pid, signal.SIGSTOP)
            time.sleep(LEASE_S / 2)
            os.kill(agent.pid, signal.SIGCONT)
            return {"host": host, "way": way, "at_step": step, "exit": None, "children_left": 0}
        if way == "freeze":
            os.kill(agent.pid, signal.SIGSTOP)
            time.sleep(2 * LEASE_S)
            os.kill(agent.pid, signal.SIGCONT)
        else:
            os.kill(agent.pid, signal.SIGKILL if way == "kill" else signal.SIGTERM)
        code = agent.wait(60)
        _, left = psutil.wait_procs(below, timeout=30)
        time.sleep(1.2 * LEASE_S)  # until the run has noticed
        self.give(host)
        return {"host": host, "way": way, "at_step": step, "exit": code, "children_left": len(left)}


def main() -> None:
    parser = options(__doc__, losses=4, seed=0, steps=60, run_dir=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    draw, began = random.Random(args.seed), time.monotonic()
    with folder() as name:
        run = (args.run_dir or name / "run").resolve()
        run.parent.mkdir(parents=True, exist_ok=True)
        sets = [one for one in SMALL if not one.startswith("train.steps")]
        more = [f"train.steps={args.steps}", f"launch.port={PORT}", f"launch.agent_lease_s={LEASE_S}"]
        more += ['launch.hosts=["a", "b", "c"]', "ssh.by_hand=true", "resources.engines=2"]
        hosts = Hosts(run, Attempt(run, [*sets, *more], resume=False))
        for host in HOSTS:
            hosts.give(host)
        rows = []
        for number in range(args.losses):
            early = number == 0  # before anything is trained
            if not early and not hosts.attempt.wait(lambda: bool(hosts.attempt.steps()), 300):
                break
            time.sleep(draw.uniform(0.5, 8.0))
            if hosts.attempt.supervisor.poll() is not None:
                break
            rows.append(hosts.lose(draw.choice(list(HOSTS)), args.ways[number % len(args.ways)]))
        code, console = hosts.attempt.end(600)
        ends = {host: agent.wait(60) for host, agent in hosts.agents.items()}
        rules = check_hub(run, args.steps) | check_files(run, args.steps, ITEMS) if code == 0 else {}
        rules |= {"agents ended well": [end for end in ends.items() if end[1] != 0]}
        rules |= {"no child outlived its agent": [row for row in rows if row["children_left"]]}
    kept = [{"rule": rule, "kept": not broken, "broken by": broken[:8]} for rule, broken in rules.items()]
    found = {"exit": code, "steps": args.steps, "seconds": time.monotonic() - began, "seed": args.seed}
    show(args, {**found, "evaluations": f"every {EVERY} steps", "losses": rows, "rules": kept})
    if code:
        print(console[-3000:], file=sys.stderr)
    sys.exit(1 if code or any(rules.values()) else 0)


if __name__ == "__main__":
    main()
