"""How many slots of an engine rollouts and an evaluation may use, so that together they use no more than it has.

Each says again and again how many it could use and how many it holds, and is told its limit. While both could use
more than there is, the evaluation gets its share and rollouts the rest; what one cannot use, the other gets. A limit
that falls interrupts nothing: slots come over as the requests in them end, and are given to the other only then.
All of this lives in memory. Who has not been heard of for a while holds nothing: its requests ended with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from astracli.hub.types import SlotLimit
from astracli.hub.wire import LARGEST

User = Literal["rollout", "eval"]
GONE_S = 15.0
"""A process that has said nothing for so long is gone."""


@dataclass
class _Use:
    wants: int = 0
    limit: int = 0
    reach: int = 0
    """Slots that it may hold until it is heard of again."""
    heard: float = float("-inf")


@dataclass
class SlotShares:
    """`slots` of each engine (0: there is no limit), and the part of them that an evaluation gets. `clock` returns
    monotonic seconds."""

    slots: int
    share: float
    clock: Callable[[], float]
    _uses: dict[tuple[str, User], _Use] = field(default_factory=dict)

    def limit(self, engine: str, user: User, wants: int, holds: int) -> SlotLimit:
        """Slots that `user` may hold at once from now on. `wants`: as many as it could use; `holds`: as many as it has,
        under the limit that it was told last."""
        if not self.slots:
            return SlotLimit(LARGEST, shared=False)
        other = self._of(engine, "eval" if user == "rollout" else "rollout")
        use = self._uses.setdefault((engine, user), _Use())
        before, use.wants, use.heard = use.limit, min(wants, self.slots), self.clock()
        use.limit = max(0, min(self._fair(user, use.wants, other.wants), self.slots - other.reach))
        # until it has read this it goes on by what it was told before, unless it has nothing to send
        use.reach = max(holds, before, use.limit) if wants or holds else 0
        return SlotLimit(use.limit, shared=bool(other.wants or other.reach))

    def _fair(self, user: User, wants: int, other_wants: int) -> int:
        """What a user gets in the end: an evaluation no more than it wants, rollouts all that is left."""
        evaluation, rollouts = (wants, other_wants) if user == "eval" else (other_wants, wants)
        share = max(1, round(self.slots * self.share))
        evaluation = min(evaluation, max(share, self.slots - rollouts))
        return evaluation if user == "eval" else self.slots - evaluation

    def _of(self, engine: str, user: User) -> _Use:
        use = self._uses.get((engine, user), _Use())
        return use if self.clock() - use.heard < GONE_S else _Use()
