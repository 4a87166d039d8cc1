"""How far generation may run ahead of training: pure arithmetic of staleness, admission and batches.

Step v - 1 publishes *version* v; *step* s trains version s into version s + 1. The age of a group counts from its
oldest token: a group of oldest version v may be trained on in steps v .. v + max_staleness, and the last of them is its
*deadline*. A group that is started now waits behind all groups in flight and all kept ones, so it is trained on no
later than step `next_step + ahead // batch_groups`; admission keeps that at or before its deadline. With a replay ratio
n every batch of new groups takes up to 1 + n steps, and groups wait that much longer.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass


def deadline(oldest_version: int, max_staleness: int) -> int:
    """Last step that may train on a group whose oldest token came from `oldest_version`."""
    return oldest_version + max_staleness


@dataclass(frozen=True)
class Replays:
    """How often batches are trained on again: every new batch takes 1 + `ratio` steps, unless its deadline ends it."""

    ratio: int = 0
    due: int = 0
    """Steps from the next one on that will repeat the last batch."""

    def new_batches(self, steps: int) -> int:
        """Batches of new groups that `steps` steps take, when every replay happens."""
        return -(-max(0, steps - self.due) // (1 + self.ratio))


def replays_due(*, ratio: int, done: int, oldest_version: int, max_staleness: int, next_step: int) -> int:
    """How often the last batch is still to be repeated: up to `ratio` times in all, never past its deadline."""
    return max(0, min(ratio - done, deadline(oldest_version, max_staleness) - next_step + 1))


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Whether more groups may be started now, and why not. All counts are groups."""

    batch_groups: int
    max_staleness: int
    steps: int
    """The length of the run."""
    next_step: int
    """The next step without a batch."""
    version: int
    """The engine's: what the groups would start at."""
    in_flight: int
    waiting: int
    """Kept groups without a batch."""
    replays: Replays = Replays()

    @property
    def lag(self) -> int:
        """Steps between the engine's version and the next batch."""
        return max(0, self.next_step - self.version)

    @property
    def allowed(self) -> int:
        """Groups in flight and waiting that staleness allows.

        At staleness 0 it is one batch while the trainer waits for it, and 0 while the trainer works on it (the version
        in the engine is then one step behind).
        """
        return self.replays.new_batches(self.max_staleness + 1 - self.lag) * self.batch_groups

    @property
    def needed(self) -> int:
        """Groups that the rest of the run still takes, those in flight and waiting included."""
        return self.replays.new_batches(self.steps - self.next_step) * self.batch_groups

    @property
    def capacity(self) -> int:
        """Groups that may be started now."""
        return max(0, min(self.allowed, self.needed) - self.in_flight - self.waiting)

    @property
    def reason(self) -> str | None:
        """What is waited for, as a noun phrase; None when groups may be started."""
        if self.capacity > 0:
            return None
        if self.needed <= 0:
            return "the end of the run: every batch has its groups"
        if self.needed <= self.in_flight + self.waiting and self.needed <= self.allowed:
            return f"the run's last {count(self.needed)}: {self.in_flight} in flight, {self.waiting} waiting"
        if self.lag > self.max_staleness:
            late = f"{count(self.lag, 'version')} behind the next batch, staleness {self.max_staleness} is allowed"
            return f"new weights in the engine: it is {late}; {count(self.in_flight)} in flight"
        behind = f", engine {count(self.lag, 'version')} behind the next batch" if self.lag else ""
        return (
            f"training: {count(self.in_flight)} in flight, {self.waiting} waiting of {self.allowed} allowed "
            f"(staleness {self.max_staleness}{behind})"
        )


def batch_reason(
    *,
    step: int,
    ready: int,
    batch_groups: int,
    in_flight: int,
    due: int,
    dropped_in_a_row: int,
    skipped_in_a_row: int = 0,
) -> str:
    """What the batch of `step` waits for, as a noun phrase. `due`: groups in flight that no later step could take."""
    if ready < batch_groups:
        text = f"groups for step {step}: {ready} of {batch_groups}, {in_flight} in flight"
        text += f"; {dropped_in_a_row} in a row dropped for no signal" if dropped_in_a_row else ""
        return text + (f"; {skipped_in_a_row} prompts in a row skipped" if skipped_in_a_row else "")
    return f"{count(due)} in flight that step {step} must take or none can"


def count(number: int, noun: str = "group") -> str:
    """`1 group`, `2 groups`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def sample_seed(seed: int, lease_id: int, index: int, turn: int = 0) -> int:
    """Seed in [0, 2^63) of a turn of sample `index` of a group: a hash of counters, never of the version or of time.

    A lease that is granted again, to whichever worker, draws the same numbers.
    """
    counters = (seed, lease_id, index, turn) if turn else (seed, lease_id, index)
    packed = struct.pack(f"<{len(counters)}Q", *counters)
    digest = hashlib.blake2b(packed, digest_size=8, person=b"astra-sample").digest()
    return int.from_bytes(digest, "little") >> 1
