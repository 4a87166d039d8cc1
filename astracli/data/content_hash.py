"""What a problem set says, as one short hash: the same for copies that differ in order, spacing or typesetting only.

A repeated item changes it, a missing one too, and so does one changed digit of an answer.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from astracli.data.prompts import Problem

_LAYOUT = re.compile(r"\\left|\\right|\\[!,;: ]|\s|[${}]")
_FRACTION = re.compile(r"\\[dt]frac")
_PADDED = re.compile(r"0+(\d+)", re.ASCII)


def normalised(text: str) -> str:
    """The text without spacing, braces, dollar signs and sizes of brackets; `\\dfrac` is `\\frac`; case folded."""
    return _LAYOUT.sub("", _FRACTION.sub(r"\\frac", unicodedata.normalize("NFKC", text))).casefold()


def content_hash(problems: Iterable[Problem]) -> str:
    """16 hex digits over the sorted hashes of (problem, answer); ids and order have no part in it."""
    items = sorted(hashlib.sha256(_item(problem).encode()).digest() for problem in problems)
    return hashlib.sha256(b"".join(items)).hexdigest()[:16]


def _item(problem: Problem) -> str:
    """Collections pad AIME's answers with zeros or do not: `073` is `73`."""
    answer = normalised(problem.answer)
    padded = _PADDED.fullmatch(answer)
    return f"{normalised(problem.question)}\n{padded[1] if padded else answer}"
