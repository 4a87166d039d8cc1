"""What is started again, how often, and where from: a child alone, a trainer's ranks once, or all from a checkpoint."""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from astracli.launch.launcher import Process, Started
from astracli.process import transient
from astracli.process.children import exit_words


@dataclass(frozen=True)
class Retry:
    """Processes that are all started once more, differently, when one of them ends with a code that asks for it."""

    code: int
    names: frozenset[str]
    processes: Callable[[], Sequence[Process]]
    """Asked when it is needed: a port must be free then."""
    words: str
    """What was wrong and what is different now."""


@dataclass
class Restarts:
    """Restarts of each child, counted over the last `window_s` seconds: what fails once a day may be started again for
    as long as a run lasts, what fails at once again may not."""

    window_s: float
    clock: Callable[[], float] = time.monotonic
    times: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def recent(self, name: str) -> int:
        """How often it was started again in the window that ends now."""
        times = self.times[name]
        while times and self.clock() - times[0] > self.window_s:
            times.popleft()
        return len(times)

    def add(self, name: str) -> None:
        self.times[name].append(self.clock())


@dataclass(frozen=True)
class End:
    """A trainer rank that is gone."""

    child: Started
    code: int | None
    """None: it was ended because it had fallen silent."""
    what: str
    """How it ended, in words."""

    @property
    def cause(self) -> str | None:
        """Why it may do better the next time; None when it may not."""
        return transient.cause(self.code, self.child.last_lines())


def first_cause(ends: Sequence[End]) -> End:
    """The rank whose end is the others' cause: one that will not pass before one that may, and both before those that
    only lost another rank. Otherwise the first."""
    lasting = [end for end in ends if end.cause is None]
    own = [end for end in ends if end.cause is not None and not end.cause.startswith(transient.LINK)]
    return (lasting or own or list(ends))[0]


@dataclass(frozen=True)
class Start:
    """A run that goes on from a checkpoint."""

    step: int
    processes: Sequence[Process]
    retry: Retry | None


@dataclass
class Resume:
    """One time that a run went on from its checkpoint by itself."""

    at_step: int
    """Steps that were trained when the trainer ended."""
    from_step: int
    """Steps that the checkpoint has trained; 0: there was none yet."""
    cause: str
    began: float
    seconds: float | None = None
    """From the trainer's end until as many steps were trained again; None while they are not."""

    def document(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("at_step", "from_step", "cause", "seconds")}


@dataclass
class Resumes:
    """When a run whose trainer ended goes on from its checkpoint by itself, and what that cost."""

    limit: int
    start: Callable[[int], Start]
    """`start(n)` rewinds the hub to the newest checkpoint and says how everything is started for the n-th time."""
    step: int = 0
    """Steps trained so far, as far as that is known; at first where the run began."""
    clock: Callable[[], float] = time.monotonic
    taken: list[Resume] = field(default_factory=list)

    def refusal(self, step: int, cause: str) -> str | None:
        """Why the run does not go on, of an end at `step`; None when it does."""
        last = self.taken[-1] if self.taken else None
        if last is not None and step <= last.at_step and _alike(cause, last.cause):
            return f"it ended so at step {last.at_step} before, and got no further from the checkpoint"
        if len(self.taken) >= self.limit:
            return f"launch.max_resumes = {self.limit} are used up"
        return None

    def reached(self, step: int | None) -> int:
        """Take note of the steps trained so far, as the trainer says; the number that is known."""
        self.step = self.step if step is None else step
        for resume in self.taken[-1:]:
            if resume.seconds is None and self.step >= resume.at_step and step is not None:
                resume.seconds = round(self.clock() - resume.began, 2)
        return self.step

    def take(self, step: int, cause: str, began: float) -> Start:
        """Begin the next one. `began`: when the trainer was found to have ended."""
        self.close()
        start = self.start(len(self.taken) + 1)
        self.taken.append(Resume(step, start.step, cause, began))
        self.step = start.step
        return start

    def close(self) -> None:
        """The run ends, or its trainer ended again: a resume that has not caught up yet took the time until now."""
        for resume in self.taken[-1:]:
            if resume.seconds is None:
                resume.seconds = round(self.clock() - resume.began, 2)


def ended(child: Started, code: int) -> End:
    words = f"ended with {exit_words(code)}" + (" before the run was done" if code == 0 else "")
    return End(child, code, words)


def _alike(one: str, other: str) -> bool:
    """The same words, whatever addresses, ports and process ids stand in them."""
    plain = [re.sub(r"0x[0-9a-fA-F]+|\d+", "#", words) for words in (one, other)]
    return plain[0] == plain[1]
