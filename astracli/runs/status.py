"""What `status.json` of a run says, and in which words people read it."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass, field
from typing import Literal

from astracli.process.identity import Identity

STATUS_BYTES = 16 << 10
"""Size of `status.json`, filled with spaces: a new text always fits into the blocks of the old one."""
State = Literal["running", "done", "failed", "interrupted"]


@dataclass
class RunStatus:
    """What `status.json` says; the supervisor alone writes it."""

    state: State
    pid: int
    create_time: float
    """Start of process `pid`, seconds since 1970 (psutil): tells a reused pid from ours."""
    host: str
    started: float
    """Unix time of this attempt's start."""
    ended: float | None = None
    attempt: int = 1
    step: int = 0
    steps: int | None = None
    exit_code: int | None = None
    cause: str | None = None
    """Why the run ended when it did not end well, one line."""
    last_lines: list[str] = field(default_factory=list)
    """What was said with the cause: the last lines of the process that ended it, or what was seen."""
    hint: str | None = None
    """What to do about the cause."""
    phase: str = ""
    """Of a run that goes on: starting, running, resuming, finishing."""
    waits: dict[str, str] = field(default_factory=dict)
    """Process -> what it waits for, or its state; a few seconds old."""
    hosts: dict[str, str] = field(default_factory=dict)
    """Other hosts of the run -> whether their agent is there, and what it runs."""
    command: str = "train"
    recipe: str = ""
    typed: str = ""
    """The command line that began this attempt, as a shell reads it; "" where Python code did."""
    boot: str | None = None
    ticks: int | None = None
    """With `boot` the start of process `pid` by a clock that nobody sets (`process/identity.py`)."""

    def alive(self) -> bool:
        """True while the recorded supervisor still runs on this host."""
        if self.host != socket.gethostname():
            return self.state == "running"
        return Identity(self.pid, self.create_time, self.boot, self.ticks).lives()

    def shown(self) -> str:
        """The state as people read it; a run that says `running` without its supervisor is `dead (resumable)`."""
        if self.state != "running":
            return self.state
        if not self.alive():
            return "dead (resumable)"
        return "running" if self.host == socket.gethostname() else f"running on {self.host}"


def status_text(status: RunStatus) -> str:
    """Of `STATUS_BYTES`, unless the last lines of a process make it longer."""
    return json.dumps(asdict(status), indent=2).ljust(STATUS_BYTES - 1) + "\n"
