"""A run over hosts that are loopback addresses of this machine, and the agents of these hosts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import shared
from loop.kill_resume import Attempt
from shared import ASTRA


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@dataclass
class Hosts:
    """`astra train` over hosts. `give` starts the agent of one as soon as its token file is there."""

    run: Path
    sets: Sequence[str]
    names: Sequence[str] = ("b", "c")
    """Hosts beside the first: 127.0.0.2, 127.0.0.3 and so on."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Of agents."""
    agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    made: list[int] = field(default_factory=list)
    resume: bool = False

    def __post_init__(self) -> None:
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.urls = dict.fromkeys(self.names, f"http://127.0.0.1:{self.port}")
        """Where the agent of each looks for the hub."""
        named = ", ".join(f'"{name}"' for name in ("a", *self.names))
        own = [f"launch.port={self.port}", f"launch.hosts=[{named}]", "ssh.by_hand=true"]
        self.attempt = Attempt(self.run, [*self.sets, *own], resume=self.resume)

    def address(self, host: str) -> str:
        return f"127.0.0.{2 + sorted({*self.names, *self.agents, host}).index(host)}"

    def token(self, host: str) -> Path:
        return self.run / "agents" / f"{host}.token"

    def folder(self, host: str) -> Path:
        return self.run.parent / f"{self.run.name}-{host}{len(self.made)}"

    def give(self, host: str, *more: str, env: Mapping[str, str] | None = None, before: Iterable[str] = ()) -> int:
        """-> the number of the agent."""
        token = self.token("new" if "--name" in more else host)
        if not self.attempt.wait(token.exists, self.attempt.seconds + 120):
            return -1  # the run has ended
        place = self.folder(host)
        url = self.urls.get(host, f"http://127.0.0.1:{self.port}")
        words = [*before, *ASTRA, "agent", url, "--token-file", str(token), "--dir", str(place), *more]
        words += [] if "--address" in more else ["--address", self.address(host)]
        own = {**os.environ, **self.env, **(env or {})}
        self.agents[host] = shared.start(words, self.run.parent, place.with_suffix(".log"), env=own, apart=True)
        self.made.append(self.agents[host].pid)
        return len(self.made) - 1

    def below(self, host: str) -> list[psutil.Process]:
        """The processes of a host."""
        return psutil.Process(self.agents[host].pid).children(recursive=True)

    def said(self) -> str:
        return self.attempt.log.read_text()

    def end(self, timeout_s: float = 600.0) -> tuple[int, str, dict[str, int]]:
        """(exit code of the run, what it said, exit code of each agent)"""
        code, console = self.attempt.end(timeout_s)
        ends = {}
        for host, agent in self.agents.items():
            try:
                ends[host] = agent.wait(90)
            except subprocess.TimeoutExpired:
                os.kill(agent.pid, signal.SIGKILL)
                ends[host] = agent.wait()
        return code, console, ends
