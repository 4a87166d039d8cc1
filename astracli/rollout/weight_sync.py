"""Where an engine stands between two versions of the weights: one state, and one table of what leads to which other.

A state says what may be asked of the engine. Two things follow from the same table and from nowhere else: the *gate*,
which lets requests through, and *results*, which requests bring back and which are held until the weights that made
them are proven.

    lost       does not answer, or was not asked yet
    starting   answers and serves nobody: it holds no proven weights, or the hub has not said that they are the ones
    serving    serves the version that the hub wants
    staging    the next version is fetched and staged; what it served before, it still serves
    pausing    its requests end before the weights change (mode `abort`)
    applying   the weights change
    verifying  a read-back compares them, under the names of the checkpoint, with what the trainer published
    lent       the trainer has the GPU (time sharing); the engine keeps a copy of its weights in host memory

An engine that is lost in the middle of an update comes back with weights that nobody trusts: what its requests bring
back meanwhile is void. One that is lost in a read-back has its results held until the read-back has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Literal


class State(StrEnum):
    LOST = auto()
    STARTING = auto()
    SERVING = auto()
    STAGING = auto()
    PAUSING = auto()
    APPLYING = auto()
    VERIFYING = auto()
    LENT = auto()


class Event(StrEnum):
    FOUND = auto()
    """It answers, and has said what it holds."""
    SERVED = auto()
    """The hub knows which version it holds, and may send it requests."""
    WANTED = auto()
    """It is to get another version."""
    SHUT = auto()
    """Its requests are to end."""
    STAGED = auto()
    """The version lies ready beside it, and it is told to apply it."""
    UNPROVEN = auto()
    """It has applied the version and reads it back while it serves: the results are held."""
    DOUBTED = auto()
    """The same after a read-back that failed: nobody is served before this one has ended."""
    REFUSED = auto()
    """It did not apply the version: its weights are neither the old nor the new ones."""
    PROVEN = auto()
    """The read-back found the trainer's weights."""
    DISPROVEN = auto()
    """The read-back found others."""
    LEND = auto()
    """The trainer gets its GPU."""
    RETURNED = auto()
    """It has its GPU back."""
    LOSE = auto()
    """It did not answer, or the supervisor saw it end."""


Gate = Literal["opens", "shuts", ""]
Results = Literal["held", "free", "void", ""]
"""`held`: they wait. `free`: they are used. `void`: what was asked before is lost. Empty: as before."""


@dataclass(frozen=True)
class Step:
    """What an event does in a state."""

    to: State
    gate: Gate = ""
    results: Results = ""


_S, _E = State, Event
TRANSITIONS: Mapping[tuple[State, Event], Step] = {
    (_S.LOST, _E.FOUND): Step(_S.STARTING),
    (_S.STARTING, _E.SERVED): Step(_S.SERVING, gate="opens"),
    # an update
    (_S.STARTING, _E.WANTED): Step(_S.STAGING),
    (_S.SERVING, _E.WANTED): Step(_S.STAGING),
    (_S.STAGING, _E.WANTED): Step(_S.STAGING),  # in full, after what was fetched or applied could not be used
    (_S.STAGING, _E.SHUT): Step(_S.PAUSING, gate="shuts"),
    (_S.STAGING, _E.STAGED): Step(_S.APPLYING),
    (_S.PAUSING, _E.STAGED): Step(_S.APPLYING),
    (_S.APPLYING, _E.REFUSED): Step(_S.STAGING, gate="shuts", results="void"),
    (_S.APPLYING, _E.SERVED): Step(_S.SERVING, gate="opens"),
    (_S.APPLYING, _E.UNPROVEN): Step(_S.VERIFYING, gate="opens", results="held"),
    (_S.APPLYING, _E.DOUBTED): Step(_S.VERIFYING, results="held"),
    (_S.VERIFYING, _E.PROVEN): Step(_S.SERVING, gate="opens", results="free"),
    (_S.VERIFYING, _E.DISPROVEN): Step(_S.STAGING, gate="shuts", results="void"),
    # time sharing
    (_S.STARTING, _E.LEND): Step(_S.LENT),
    (_S.SERVING, _E.LEND): Step(_S.LENT, gate="shuts"),
    (_S.LENT, _E.RETURNED): Step(_S.STARTING),
    # an engine that is gone
    (_S.LOST, _E.LOSE): Step(_S.LOST),
    (_S.STARTING, _E.LOSE): Step(_S.LOST),
    (_S.SERVING, _E.LOSE): Step(_S.LOST, gate="shuts"),
    (_S.STAGING, _E.LOSE): Step(_S.LOST, gate="shuts"),
    (_S.PAUSING, _E.LOSE): Step(_S.LOST),
    (_S.APPLYING, _E.LOSE): Step(_S.LOST, gate="shuts", results="void"),
    (_S.VERIFYING, _E.LOSE): Step(_S.LOST, gate="shuts"),
    (_S.LOST, _E.PROVEN): Step(_S.LOST, results="free"),
    (_S.LOST, _E.DISPROVEN): Step(_S.LOST, results="void"),
    (_S.LENT, _E.LOSE): Step(_S.LOST),
}


class WeightSync:
    """The state of one engine. `tell` it what happened; it knows no engine and sends nothing."""

    def __init__(self) -> None:
        self.state = State.LOST
        self.version: int | None = None
        """What the engine holds and may serve; None when that is not known or not to be trusted."""
        self.gate = asyncio.Event()
        """Set while requests may be sent."""
        self.proven = asyncio.Event()
        """Set unless results are held."""
        self.proven.set()
        self.voids = 0
        """How often results became void: those of requests that were sent before are lost."""

    def tell(self, event: Event) -> None:
        """Raises RuntimeError for what cannot happen in this state."""
        step = TRANSITIONS.get((self.state, event))
        if step is None:
            raise RuntimeError(f"weight sync: `{event}` cannot happen to an engine that is {self.state}")
        self.state = step.to
        if step.gate:
            (self.gate.set if step.gate == "opens" else self.gate.clear)()
        if step.results == "void":
            self.voids += 1
            self.version = None
        if step.results:
            (self.proven.clear if step.results == "held" else self.proven.set)()

    def hold(self) -> None:
        """Results that come back from here on are held; called from any thread, in the pause in which a version was
        applied that has to be read back. Of an engine that was lost since then they are void already."""
        if self.state is State.APPLYING:
            self.proven.clear()
