"""Whether so many groups in a row were dropped that no more of them will make a batch, and what was seen of them."""

from __future__ import annotations

import json

from astracli.hub.schema import Database
from astracli.hub.types import HubSettings, NoSignal

FIRST, LAST = 3, 8
"""Steps whose reward is told when a run ends without signal."""
PROMPTS = 64
"""Dropped groups whose prompts are told then."""


def found(db: Database, settings: HubSettings) -> NoSignal | None:
    """What was seen, once so many groups in a row were dropped that more of them will not help."""
    dropped = db.meta("dropped_in_a_row")
    most = settings.max_dropped_batches * settings.batch_groups
    if not most or dropped < most:
        return None
    newest = "(SELECT * FROM groups WHERE state = 'dropped' ORDER BY place DESC LIMIT ?)"
    counts = ("samples", "truncated", "no_answer", "errors", "timeouts")
    sums = ", ".join(f"COALESCE(SUM({name}), 0)" for name in counts)
    row = db.one(f"SELECT MIN(reward_mean), MAX(reward_mean), {sums} FROM {newest}", dropped)
    assert row is not None
    prompts = db.rows(f"SELECT prompt FROM {newest} WHERE prompt IS NOT NULL", min(dropped, PROMPTS))
    return NoSignal(
        groups=dropped,
        batches=dropped // settings.batch_groups,
        lowest=row[0],
        highest=row[1],
        rewards=_rewards(db),
        prompts=[prompt for (prompt,) in prompts],
        **dict(zip(counts, row[2:], strict=True)),
    )


def _rewards(db: Database) -> list[tuple[int, float]]:
    """(step, mean reward of all that arrived), of the first and the last steps."""
    columns = "SELECT step, stats FROM batches ORDER BY step"
    rows = dict([*db.rows(f"{columns} LIMIT ?", FIRST), *db.rows(f"{columns} DESC LIMIT ?", LAST)])
    means = {step: json.loads(stats).get("reward_mean") for step, stats in sorted(rows.items())}
    return [(step, mean) for step, mean in means.items() if mean is not None]
