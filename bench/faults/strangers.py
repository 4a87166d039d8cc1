"""Who can reach a run: where its processes listen, in every layout; floods of connections; a page in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import shared
from loop.kill_resume import Attempt

from faults import browser
from faults.world import MARK, Row, World, attempted, marked

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from listeners import listening

STEPS = 6
OWN_NETWORK = (
    *("unshare", "-n", "sh", "-c"),
    'ip link set lo up && ip address add 10.99.0.1/32 dev lo && exec "$@"',
    "sh",
)
"""A command in front: a network of its own with an address beside those of loopback. As root."""


# ---- where a run listens


@contextmanager
def watched(run: Path) -> Iterator[dict[str, set[int]]]:
    """{address: ports} on which processes of the run, or its agents, listen until the end of the block."""
    found: dict[str, set[int]] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for address, port in listening(one.pid for one in marked(run)):
                found.setdefault(address, set()).add(port)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def layout(world: World, name: str, row: Row, *, sets: Sequence[str] = (), at: Sequence[str] = ("127.0.0.1",),
           most: int = 8, before: Sequence[str] = (), agent: str | None = None) -> Row:  # fmt: skip
    """A whole run. Its processes listen `at` these addresses (gloo at the first of an interface), at `most` ports.
    `agent`: the address of a second host."""
    run = world.folder / name
    attempt = world.start(run, STEPS, sets, before=before)
    with watched(run) as found, ExitStack() as stack:
        if agent is not None:
            stack.enter_context(_agent(attempt, agent))
        row = world.judge(row, attempt, ())
    row.said = ", ".join(f"{address}: {len(ports)}" for address, ports in sorted(found.items()))
    if beyond := set(found) - set(at):
        row.problems.append(f"listens at {sorted(beyond)}")
    if not found or sum(map(len, found.values())) > most:
        row.problems.append(f"{found or 'no'} listeners were seen, at most {most} are known")
    row.problems += world.books(run) if row.outcome == "finished" else [row.outcome]
    return row


def other(world: World, name: str, row: Row, words: Sequence[str]) -> Row:
    """A whole command that is no training run. What it starts listens on loopback."""
    run = world.folder / name
    log = run.with_suffix(".log")
    env = {**os.environ, MARK: str(run), "TMPDIR": str(world.tmp), "OMP_NUM_THREADS": "1"}
    started = shared.start([*shared.ASTRA, *words], world.folder, log, env=env, apart=True)
    with watched(run) as found:
        code = started.wait(300)
    row.outcome = "finished" if code == 0 else f"ended, exit {code}"
    row.said = ", ".join(f"{address}: {len(ports)}" for address, ports in sorted(found.items()))
    if code:
        row.problems.append(log.read_text()[-600:])
    if set(found) != {"127.0.0.1"}:
        row.problems.append(f"listens at {sorted(found)}")
    row.problems += world.left_behind(run)
    return row


@contextmanager
def _agent(attempt: Attempt, address: str) -> Iterator[None]:
    named = re.compile(r"on it, give `astra (agent \S+) --token-file (\S+)`")
    assert attempt.wait(lambda: bool(named.search(attempt.log.read_text()))), attempt.end()[1]
    found = named.search(attempt.log.read_text())
    assert found is not None
    place = attempt.run.with_name(f"{attempt.run.name}_b")
    words = [*shared.ASTRA, *found[1].split(), "--token-file", found[2], "--address", address, "--dir", str(place)]
    agent = shared.start(words, attempt.run.parent, place.with_suffix(".log"), apart=True)
    try:
        yield
    finally:
        agent.wait(60)


# ---- floods


def flood(world: World, row: Row, connections: int = 1300) -> Row:
    """Half-open requests to the hub and the engine, at a limit of 1,024 descriptors."""
    run = world.folder / "flood"
    attempt = world.start(run, 14, before=("prlimit", "--nofile=1024:1024"))
    attempt.wait(lambda: bool(attempt.steps()))
    held: list[socket.socket] = []
    for port in ports_of(run) * (connections // 2):
        with suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=2))
            held[-1].send(b"POST /lease HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ")
    row.where += f", {len(held)} opened"
    row = world.judge(row, attempt, ())
    for each in held:
        each.close()
    row.problems += world.books(run)
    return row


def ports_of(run: Path) -> list[int]:
    config = json.loads((run / "config" / "rollout.json").read_text())
    return [urlsplit(url).port or 0 for url in (config["hub_url"], config["engines"][0]["url"])]


def page(world: World, row: Row) -> Row:
    """A live run, and a page that tries what it can, with the run's token too (`browser.py`)."""
    run = world.folder / "page"
    attempt = world.start(run, 100_000)
    attempt.wait(lambda: bool(attempt.steps()))
    token = json.loads((run / "config" / "rollout.json").read_text())["token"]
    tried = browser.attacked(ports_of(run), token)
    row.where, row.problems = f"{row.where}: {tried.by}, {len(tried.seen)} requests", tried.problems
    os.kill(attempt.supervisor.pid, signal.SIGTERM)
    row = world.judge(row, attempt, ())
    row.said = tried.summary
    row.problems += [] if row.outcome == "interrupted" else [row.outcome]
    return world.finish(run, row)


Work = Callable[[World, Row], Row]
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one-rank": ("one rank", {}),
    "two-ranks": ("two ranks", {"sets": ("resources.train_ranks=2",)}),
    "two-engines": ("two engines", {"sets": ("resources.engines=2",)}),
    "two-hosts": (
        "two hosts",
        {"sets": ('launch.hosts=["a", "b"]',), "at": ("127.0.0.1", "127.0.0.2"), "agent": "127.0.0.2"},
    ),
    "ipv6": (
        "two ranks, launch.host = ::1",
        {"sets": ("resources.train_ranks=2", "launch.host=::1"), "at": ("::1", "127.0.0.1")},
    ),
    "private": (
        "two ranks, launch.host = 10.99.0.1",
        {"sets": ("resources.train_ranks=2", "launch.host=10.99.0.1", "launch.network=private"),
         "at": ("10.99.0.1", "127.0.0.1"), "before": OWN_NETWORK},
    ),
}  # fmt: skip
ONE = ("--set", "eval.samples=1", "--set", "eval.pass_k=1", "--set", 'eval.benchmarks=["small.jsonl"]')
COMMANDS = {
    "eval": ("eval", shared.RECIPE, *ONE, "--set", "data.reward=coin:coin"),
    "rollout": ("rollout", shared.RECIPE, "--n", "2"),
    "sft": ("sft", "tiny-sft", *ONE, "--set", "train.steps=2", "--set", "eval.every=2"),
}
ROWS: dict[str, tuple[str, str, Work]] = {
    **{
        name: ("where a run listens", f"astra {name}", lambda w, r, n=name, words=words: other(w, n, r, words))
        for name, words in COMMANDS.items()
    },
    **{
        name: ("where a run listens", where, lambda w, r, n=name, more=more: layout(w, n, r, **more))
        for name, (where, more) in LAYOUTS.items()
    },
    "flood": ("flood of connections", "1,024 descriptors", flood),
    "page": ("page in a browser", "hub and engine", page),
}


def rows(world: World, names: list[str]) -> list[Row]:
    return [attempted(Row(ROWS[name][0], ROWS[name][1]), lambda row, n=name: ROWS[n][2](world, row)) for name in names]
