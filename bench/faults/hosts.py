"""Runs over three hosts, each with something that goes wrong on one of them; then the books.

    python bench/faults/hosts.py [--rows kill term freeze ...] [--times 1] [--steps 60] [--seed 0] [--run-dir DIR]

The hosts are loopback addresses of this machine. Each row is a run: its agents are killed, told to leave or stopped for
longer (`freeze`) or less (`hold`) than their lease at a random moment; killed as they start, while a group is
generated, while a version is staged; cut off by a relay for less (`healed`) or more (`cut`) than their lease; started
with an old or a foreign token, with another version of a package, with a clock an hour wrong, on a disk that fills up,
behind a link of 10 Mbit/s; joined at a later version, several at once; and left alive by a supervisor that is killed
and resumed. Where an agent is gone, another is started with the new token file. At the end the run must have lost no
group and trained none twice, have one evaluation for every step at which one became due and the right weights; nothing
may be left running on any host. Prints a line a row; exits 1 when a rule is broken. About 40 s a row.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loop.books import check_files, check_hub
from loop.kill_resume import EVERY, ITEMS, SMALL
from shared import folder, options, say, show

from faults.agents import Hosts
from faults.disks import can_mount, disk, fill
from faults.network import HOOK
from faults.relay import Relay, Weather

LEASE_S = 10.0
MBIT = 125_000


@dataclass
class Case:
    """One row: a run, its hosts, and what was found beside the books."""

    name: str
    hosts: Hosts
    draw: random.Random
    steps: int
    problems: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    left: list[psutil.Process] = field(default_factory=list)
    """Processes of agents that were lost: none may live on."""
    relays: list[Relay] = field(default_factory=list)
    before: int = 0
    """How often the run had said that the host's agent is gone, before the last loss."""

    def wait(self, ready: Callable[[], bool], timeout_s: float = 300.0) -> bool:
        """Until `ready()`; False when the run ended before, or after so many seconds from now."""
        return self.hosts.attempt.wait(ready, self.hosts.attempt.seconds + timeout_s)

    def noticed(self, host: str) -> int:
        """How often the run has said that this host's agent is gone."""
        return self.hosts.said().count(f"the agent of host `{host}`")

    def lose(self, host: str, number: int) -> None:
        """A signal to its agent."""
        self.before = self.noticed(host)
        with suppress(psutil.Error):
            self.left += self.hosts.below(host)
        os.kill(self.hosts.agents[host].pid, number)

    def again(self, host: str) -> None:
        """Another agent, once the run has noticed that the last is gone."""
        self.hosts.agents.pop(host).wait(60)
        self.wait(lambda: self.noticed(host) > self.before, 60)
        if self.hosts.attempt.supervisor.poll() is None and self.hosts.token(host).exists():
            self.hosts.give(host)

    def trained(self, steps: int) -> bool:
        return self.wait(lambda: max(self.hosts.attempt.steps(), default=-1) >= steps, 400)

    def some_steps(self) -> None:
        self.trained(self.draw.randrange(1, max(2, self.steps // 4)))
        time.sleep(self.draw.uniform(0.0, 1.0))

    def expect(self, held: bool, words: str) -> None:
        if not held:
            self.problems.append(words)

    def relay(self, host: str) -> Relay:
        """Between a host's agent and the hub."""
        relay = Relay(self.hosts.run.parent / f"relay_{len(self.relays)}", self.draw, target=self.hosts.port)
        self.relays.append(relay)
        self.hosts.urls[host] = f"http://127.0.0.1:{relay.port}"
        return relay


# ---- losses


def signalled(number: int) -> Callable[[Case], None]:
    def row(case: Case) -> None:
        case.some_steps()
        case.lose("b", number)
        case.again("b")

    return row


def freeze(case: Case) -> None:
    case.some_steps()
    case.lose("b", signal.SIGSTOP)
    time.sleep(2 * LEASE_S)
    os.kill(case.hosts.agents["b"].pid, signal.SIGCONT)
    case.again("b")


def hold(case: Case) -> None:
    case.some_steps()
    os.kill(case.hosts.agents["b"].pid, signal.SIGSTOP)
    time.sleep(LEASE_S / 2)
    os.kill(case.hosts.agents["b"].pid, signal.SIGCONT)


def at_start(case: Case) -> None:
    """Before its engine is ready."""
    place = next(case.hosts.run.parent.glob(f"{case.hosts.run.name}-b*"), None)
    case.wait(lambda: place is not None and (place / "config" / "rollout.json").exists())
    time.sleep(case.draw.uniform(0.0, 2.0))
    case.lose("b", signal.SIGKILL)
    case.again("b")


def in_a_group(case: Case) -> None:
    case.trained(1)

    def leased() -> bool:
        with suppress(sqlite3.Error), sqlite3.connect(f"file:{case.hosts.run}/hub.sqlite?mode=ro", uri=True) as hub:
            asked = "SELECT COUNT(*) FROM groups WHERE state = 'leased' AND worker = 'rollout'"
            return bool(hub.execute(asked).fetchone()[0])
        return False

    case.found["leased"] = case.wait(leased)
    case.lose("b", signal.SIGKILL)
    case.again("b")


def in_staging(case: Case) -> None:
    case.trained(1)
    stage = next(case.hosts.run.parent.glob(f"{case.hosts.run.name}-b*")) / "stage" / "engine0"
    before = _versions(stage)
    case.found["staged"] = case.wait(lambda: _versions(stage) - before != set())
    case.lose("b", signal.SIGKILL)
    case.again("b")


def _versions(stage: Path) -> set[str]:
    with suppress(OSError):
        return {path.name for path in stage.iterdir() if path.name.startswith("v")}
    return set()


def supervisor(case: Case) -> None:
    """It is killed while agents live, and the run is resumed."""
    case.trained(3)
    for host in case.hosts.names:
        case.left += case.hosts.below(host)
    case.hosts.attempt.kill("supervisor")
    case.hosts.attempt.end()
    old = case.hosts
    for agent in old.agents.values():
        case.expect(agent.wait(60) == 1, "an agent without a hub did not end with 1")
    case.hosts = Hosts(old.run, [f"train.steps={case.steps}"], names=old.names, resume=True)
    case.hosts.made = old.made
    for host in case.hosts.names:
        case.hosts.give(host)


# ---- the network


def partition(length: float) -> Callable[[Case], None]:
    """Nothing passes between agent and hub for `length` leases, at a random moment."""

    def row(case: Case) -> None:
        case.some_steps()
        relay, case.before = case.relays[0], case.noticed("b")
        if length > 1:
            case.left += case.hosts.below("b")
        relay.weather = Weather(hold=True)
        time.sleep(length * LEASE_S)
        relay.weather = Weather()
        if length > 1:
            case.again("b")

    return row


def slow(case: Case) -> None:
    """10 Mbit/s. Other hosts go on meanwhile."""
    case.trained(case.steps - 2)


# ---- who may join


def tokens(case: Case) -> None:
    """A token that is in use, and one of an agent that is gone."""
    case.trained(1)
    saved = case.hosts.run.parent / "saved.token"
    saved.write_text(case.found.pop("ticket"))
    saved.chmod(0o600)

    def refused(when: str) -> None:
        code, text = _agent(case, saved)
        words = "does not take this token" in text or "has been used" in text
        case.expect(code in (1, 2) and words, f"a token {when} was not refused: {code}, {text[-200:]}")

    refused("that another agent uses")
    case.lose("b", signal.SIGKILL)
    case.again("b")
    refused("of an agent that is gone")


def _agent(case: Case, token: Path, **env: str) -> tuple[int, str]:
    """An agent that should end by itself -> (exit code, what it said)"""
    place = case.hosts.run.parent / f"other{len(case.hosts.made)}"
    words = [sys.executable, "-m", "astracli", "agent", f"http://127.0.0.1:{case.hosts.port}"]
    words += ["--token-file", str(token), "--address", "127.0.0.9", "--dir", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    return done.returncode, done.stdout + done.stderr


def versions(case: Case) -> None:
    """Another version of a package, before the right one comes."""
    token = case.hosts.token("b")
    assert case.wait(token.exists), case.hosts.said()
    for package in ("astracli", "transformers"):
        code, text = _agent(case, token, PYTHONPATH=str(HOOK), ASTRA_FAULTS_VERSION=f"{package}=0.0.1")
        said = f"has {package} 0.0.1, this run uses {package} "
        case.expect(code == 1 and said in text, f"another {package} was not refused with both: {code}, {text[-300:]}")
    for host in case.hosts.names:
        case.hosts.give(host)


def join(case: Case) -> None:
    """A host that is not in launch.hosts, at a later version."""
    case.trained(min(case.steps // 2, 50))
    _newcomers(case, 1)


def several(case: Case) -> None:
    case.trained(2)
    _newcomers(case, case.found.pop("joins"))


def _newcomers(case: Case, count: int) -> None:
    """Each takes the token file of the moment; all start at once otherwise."""
    began = time.monotonic()
    for n in range(count):
        token = case.hosts.token("new")
        before = token.read_text()
        name = f"n{n}"
        case.hosts.give(name, "--name", name, "--address", f"127.0.1.{n + 1}")
        case.wait(lambda: token.read_text() != before, 60)  # noqa: B023
    served: set[str] = set()

    def leased() -> bool:
        with suppress(sqlite3.Error), sqlite3.connect(f"file:{case.hosts.run}/hub.sqlite?mode=ro", uri=True) as hub:
            served.update(row[0] for row in hub.execute("SELECT DISTINCT worker FROM groups") if row[0])
        return len(served) >= len(case.hosts.names) + count

    case.expect(case.wait(leased, 400), f"only {sorted(served)} had a lease")
    case.found["first_lease_s"] = round(time.monotonic() - began, 1)


# ---- its machine


def clock(case: Case) -> None:
    case.trained(case.steps - 2)


def full_disk(case: Case) -> None:
    """The disk of a host that joined fills up: what runs there fails, the run goes on without it."""
    case.trained(1)
    with disk(case.hosts.run.parent / "small") as place:
        case.hosts.give("x", "--name", "x", "--address", "127.0.1.1", "--dir", str(place / "agent"))
        case.wait(lambda: "host `x` is here" in case.hosts.said())
        case.trained(max(case.hosts.attempt.steps(), default=0) + 3)
        undo = fill(place, 0)
        case.trained(case.steps - 1)
        undo()
        code, _, ends = case.hosts.end()
        case.found |= {"ends": ends, "exit": code}


@dataclass(frozen=True)
class Row:
    work: Callable[[Case], None]
    joins_itself: bool = False
    """It starts the agents of the plan's hosts."""
    relay: Weather | None = None
    """Host `b` reaches the hub through a relay."""
    env: dict[str, str] = field(default_factory=dict)
    """Of host `b`'s agent."""
    least_steps: int = 0
    """So that there is work while it happens."""


ROWS = {
    "kill": Row(signalled(signal.SIGKILL)),
    "term": Row(signalled(signal.SIGTERM)),
    "freeze": Row(freeze),
    "hold": Row(hold),
    "start": Row(at_start),
    "group": Row(in_a_group),
    "staging": Row(in_staging),
    "healed": Row(partition(0.5), relay=Weather()),
    "cut": Row(partition(2.0), relay=Weather()),
    "slow": Row(slow, relay=Weather(bytes_per_s=10 * MBIT)),
    "tokens": Row(tokens),
    "versions": Row(versions, joins_itself=True),
    "clock-ahead": Row(clock, env={"ASTRA_FAULTS_CLOCK": "3600"}),
    "clock-behind": Row(clock, env={"ASTRA_FAULTS_CLOCK": "-3600"}),
    "join": Row(join, least_steps=120),
    "several": Row(several, least_steps=200),
    "disk": Row(full_disk),
    "supervisor": Row(supervisor),
}
"""`kill` and so on: what is done to host `b`."""


def played(
    name: str, place: Path, draw: random.Random, steps: int, joins: int = 0, sets: Sequence[str] = ()
) -> dict[str, Any]:
    """One row. `sets`: of the recipe, over those of all rows."""
    row, began = ROWS[name], time.monotonic()
    steps = max(steps, row.least_steps)
    own = [one for one in SMALL if not one.startswith("train.steps")]
    own += [f"train.steps={steps}", f"launch.agent_lease_s={LEASE_S}", "resources.engines=2"]
    own += ["launch.hub_history_steps=100000"]  # for the books
    case = Case(name, Hosts(place / "run", [*own, *sets]), draw, steps)
    case.found["joins"] = joins
    if row.relay is not None:
        case.relay("b").weather = row.relay
    env = dict(row.env)
    if clock_s := env.get("ASTRA_FAULTS_CLOCK"):
        file = place / "clock"
        file.write_text(clock_s)
        env = {"ASTRA_FAULTS_CLOCK": str(file), "PYTHONPATH": str(HOOK)}
    try:
        if not row.joins_itself:
            if case.wait(case.hosts.token("b").exists):
                case.found["ticket"] = case.hosts.token("b").read_text()
            for host in case.hosts.names:
                case.hosts.give(host, env=env if host == "b" else None)
        row.work(case)
        return _judged(case, began)
    finally:
        for relay in case.relays:
            relay.close()
        _end(case)


def _judged(case: Case, began: float) -> dict[str, Any]:
    code, console, ends = case.hosts.end()
    run, steps = case.hosts.run, case.steps
    rules = check_hub(run, steps) | check_files(run, steps, ITEMS) if code == 0 else {}
    case.problems += [f"{rule}: {broken[:4]}" for rule, broken in rules.items() if broken]
    if code:
        case.problems.append(f"the run ended with {code}: {console[-600:]}")
    case.problems += [f"the agent of {host} ended with {end}" for host, end in ends.items() if end]
    _, alive = psutil.wait_procs(case.left, timeout=30)
    case.expect(not alive, f"{len(alive)} processes outlived their agent")
    for key in ("ticket", "joins"):
        case.found.pop(key, None)
    seconds = time.monotonic() - began
    return {"row": case.name, "seconds": seconds, **case.found, "problems": "; ".join(case.problems) or "none"}


def _end(case: Case) -> None:
    """What a row left that did not come to its end."""
    for child in (case.hosts.attempt.supervisor, *case.hosts.agents.values()):
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()


def main() -> None:
    parser = options(__doc__, times=1, seed=0, steps=60, joins={10: "of the row `several`"}, run_dir=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    args = parser.parse_args()
    draw, rows = random.Random(args.seed), []
    with folder() as name:
        for number in range(args.times):
            for row in args.rows:
                if row == "disk" and not can_mount():
                    say(row=row, problems="left out: it mounts a file system, which root can")
                    continue
                place = (args.run_dir or name) / f"{row}{number}"
                place.mkdir(parents=True, exist_ok=True)
                rows.append(played(row, place, draw, args.steps, args.joins))
                say(rows[-1])
                if args.run_dir is None:
                    shutil.rmtree(place, ignore_errors=True)
    show(args, {"seed": args.seed, "steps": args.steps, "evaluations": f"every {EVERY} steps", "rows": rows})
    sys.exit(any(row["problems"] != "none" for row in rows))


if __name__ == "__main__":
    main()
