"""Which prompt a lease gets: of a few candidates, one that the hub's records show as solved sometimes is more likely.

Lease i has the candidates i * n .. i * n + n - 1 of the endless sequence of prompts, so no place of the sequence is
asked twice. A candidate weighs 1 when the solve rate of its kind lies in the band or is not known yet, else `outside`;
one is drawn by a hash of (seed, lease). A kind is a level of the generated family or one problem of a data set. Its
solve rate is the mean reward of its last `window` groups (dropped ones count) that came in before the batch now being
collected: what is known does not depend on the order in which this batch's groups come in.

The choice is written with the lease. A resumed run reads it; a lease that is forgotten chooses the same again, because
the record it chose by is older than the batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from astracli.hub.schema import Database

if TYPE_CHECKING:
    from astracli.config.recipe_data import CurriculumTable


@dataclass(frozen=True)
class Curriculum:
    _table: CurriculumTable
    _seed: int
    _kind: Callable[[int], str]
    """The kind of the prompt at a place of the endless sequence."""

    def choose(self, database: Database, lease_id: int) -> tuple[int, str]:
        """(place of the prompt in the endless sequence, its kind)"""
        candidates = self._table.candidates
        places = range(lease_id * candidates, (lease_id + 1) * candidates)
        kinds = [self._kind(place) for place in places]
        weights = {kind: self._weight(solve_rate(database, kind, self._table.window)) for kind in set(kinds)}
        left = uniform(self._seed, lease_id) * sum(weights[kind] for kind in kinds)
        for place, kind in zip(places, kinds, strict=True):
            left -= weights[kind]
            if left < 0:
                return place, kind
        return places[-1], kinds[-1]  # rounding

    def _weight(self, rate: float | None) -> float:
        return 1.0 if rate is None or self._table.low <= rate <= self._table.high else self._table.outside


def solve_rate(database: Database, kind: str, window: int) -> float | None:
    """Mean reward of the last `window` groups of a kind, the current batch's left out; None when there are none."""
    row = database.one(
        "SELECT AVG(reward_mean) FROM (SELECT reward_mean FROM groups WHERE kind = ? "
        "AND arrived < (SELECT COALESCE(MAX(step) + 1, 0) FROM batches) ORDER BY lease_id DESC LIMIT ?)",
        kind,
        window,
    )
    assert row is not None
    return None if row[0] is None else float(row[0])


def uniform(seed: int, lease_id: int) -> float:
    """In [0, 1): a hash of the counters."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, lease_id), digest_size=8, person=b"astra-prompt").digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
