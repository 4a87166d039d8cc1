"""Majority@k: how often the answer that most of k samples give is right.

The votes are the answers as the grader reads them, integers in one form, other text without spacing; a sample without
an answer does not vote, and without any vote the item is wrong. A tie is shared: two leading answers of which one is
right count one half. k = 1 and k = n are exact; between, the mean over `SUBSETS` seeded draws of k of the n samples.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from astracli.data.content_hash import normalised
from astracli.rewards import grader

SUBSETS = 64

Vote = tuple[str | None, bool]
"""(answer in one form, whether it is right); None does not vote."""


def vote(text: str, right: bool) -> Vote:
    """A completion's vote."""
    answer, _ = grader.read_answer(text, "boxed_or_last_number")
    if answer is None:
        return None, right
    return grader.integer(answer) or normalised(answer), right


def winner_share(votes: Sequence[Vote]) -> float:
    """1 when the answer with the most votes is right, 0 when not, the right share of the leaders in a tie."""
    counts = Counter(answer for answer, _ in votes if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = [answer for answer, count in counts.items() if count == most]
    right = {answer for answer, is_right in votes if is_right}
    return sum(answer in right for answer in leaders) / len(leaders)


def sizes(n: int) -> list[int]:
    """The k that are reported: powers of two below n, and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def majority_at(items: Sequence[Sequence[Vote]]) -> dict[int, float]:
    """{k: majority@k} over items with the same number of votes each."""
    n = len(items[0])
    found = {}
    for k in sizes(n):
        total = 0.0
        for place, votes in enumerate(items):
            draw = random.Random(place * 1_000_003 + k)
            exact = [votes] if k == n else [[each] for each in votes] if k == 1 else None
            polls = exact or [draw.sample(votes, k) for _ in range(SUBSETS)]
            total += sum(map(winner_share, polls)) / len(polls)
        found[k] = total / len(items)
    return found
