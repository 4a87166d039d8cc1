"""The rewards that ship: their names, and `probe`, which needs no process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from astracli.rewards.types import Grade, GradeItem

MATH = ("math", "math_boxed", "number")
CODE = ("code", "code_share")
BUILTIN = (*MATH, "probe", *CODE)
"""`math`: the last box, else the last number. `math_boxed`: only a box counts. `number`: the last number as written.
`probe`: see `probe_grades`. `code`: 1 when the completion's program passes all tests; `code_share`: their
share."""


def probe_grades(items: Sequence[GradeItem]) -> list[Grade]:
    """A reward for checking the machinery with any model: 1 where the share of even token ids is at or over the median.

    About half of any group with different completions gets it, whatever the model says. Items are one group; needs
    `tokens`.
    """
    shares = []
    for item in items:
        if item.tokens is None:
            raise ValueError("reward `probe` needs the completion's token ids")
        shares.append(sum(int(token) % 2 == 0 for token in item.tokens) / max(1, len(item.tokens)))
    median = statistics.median(shares) if shares else 0.0
    return [Grade(1.0, "right") if share >= median else Grade(0.0, "wrong") for share in shares]
