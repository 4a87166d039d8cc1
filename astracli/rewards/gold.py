"""Whether a gold answer is one that a reward of mathematics can compare with anything."""

from __future__ import annotations

import re

from astracli.rewards.grader import integer
from astracli.rewards.grading import boxes, choices, notation, typed

COMPARED = ("math", "math_boxed", "number")
"""Rewards that read the gold; any other takes it as it comes."""
_PROSE_WORDS = 4
"""So many words in a row are a sentence, and no answer."""
_WORD = re.compile(r"[A-Za-z]{2,}")


def readable(reward: str, gold: str) -> bool:
    """Whether the reward reads the gold as a number, a formula, a choice or a few words. A short answer can be right
    only then: other golds are matched by nothing but their own text."""
    if reward not in COMPARED:
        return True
    gold = (boxes.boxed(gold) or gold) if "\\boxed" in gold else gold
    if integer(gold) is not None:
        return True
    if reward == "number":
        return False
    plain = notation.plain(gold)
    if choices.letters(plain) or typed.words_of(gold) is not None:
        return True
    if "\\" in plain:  # for math-verify, which reads what is closed
        return plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    prose = len(_WORD.findall(plain)) >= _PROSE_WORDS
    return not prose and typed.reads(plain)
