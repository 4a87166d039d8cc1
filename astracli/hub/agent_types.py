"""What agents tell the hub and what they are told. `hub/agents.py` keeps it, `hub/api.py` carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from astracli.hub.types import _Answer

AGENT_LOG_BYTES = 256 << 10
"""Of a process's log that one report carries."""


@dataclass(frozen=True)
class Joined(_Answer):
    """The answer to an agent that may join."""

    token: str = field(repr=False)
    """Its own, for every further request; it ends when the agent leaves."""
    host_token: str = field(repr=False)
    """What the processes of its host ask of each other."""
    lease_s: float
    run: str


@dataclass(frozen=True)
class Order(_Answer):
    """What an agent is to do. It does each once, in the order of `number`."""

    number: int
    """From 1."""
    kind: Literal["start", "stop", "stacks", "end"]
    start: int = 0
    """Number of the start of the process that is meant; with `stop`, 0: see `starts`."""
    starts: list[int] = field(default_factory=list)
    grace_s: float = 0.0
    document: dict[str, Any] = field(default_factory=dict)
    """With `start`: `plan`, `config`, `env`."""


@dataclass(frozen=True)
class Orders(_Answer):
    orders: list[Order]


@dataclass(frozen=True)
class ProcessNews(_Answer):
    """A process of an agent, as it is now."""

    start: int
    """Number of its start, as the order said."""
    exit_code: int | None
    """None while it runs. Told once its log was told to the end."""
    log_time: float
    """When it last wrote, in unix seconds."""
    offset: int
    """Where in its log `text` begins, in bytes from the start of this process."""
    text: str
    """What it wrote since, as base64."""
