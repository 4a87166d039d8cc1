"""Boxes of a completion: the last one, those that stand side by side with it, and the minus sign before."""

from __future__ import annotations

import re

BOX = re.compile(r"\\f?boxed\s*\{")
_MINUS = re.compile(r"[-−–]\s*(?:\$|\\\(|\\\[)?\s*$")
_JOINT_DRESSING = re.compile(
    r"\\\(|\\\)|\\\[|\\\]|\\q?quad|\\[,;:! ]|[$*,;.:\s&]|\\\\"
    r"|\\text\{([^{}]*)\}|\\mathrm\{([^{}]*)\}|[A-Za-z](?:_\{?\w+\}?)?\s*="
)
_CORRECTED = re.compile(
    r"\b(?:no|not|wait|actually|correct\w*|instead|mistake|final\w*|so|therefore|thus|hence|sorry|then|rather|but|check\w*"
    r"|again|simplif\w*|gives?|get|is|equals|becomes|answer|which)\b|=|\\(?:to|implies|Rightarrow|approx)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？](?=\s+\S)|\n\s*\n\s*\S")


def boxed(text: str) -> str | None:
    """What the last box says: None without a box, empty when it is not closed or says nothing."""
    starts = list(BOX.finditer(text))
    if not starts:
        return None
    contents = [(m.start(), balanced(text, m.end()), m.end()) for m in starts[-12:]]
    start, content, _ = contents[-1]
    if content is None or not content.strip():
        return ""
    answers = [content.strip()]
    for (place, before, inner), following in zip(contents[-2::-1], contents[:0:-1], strict=False):
        if before is None or inner + len(before) > following[0]:
            break
        between = text[inner + len(before) + 1 : following[0]]
        if not _side_by_side(between):
            break
        answers.insert(0, before.strip())
        start = place
    sign = "-" if _minus_before(text[:start]) else ""
    distinct = list(dict.fromkeys(answers))
    return sign + distinct[0] if len(distinct) == 1 else ", ".join([sign + distinct[0], *distinct[1:]])


def _side_by_side(between: str) -> bool:
    """Whether two boxes with this text between them give one answer of several parts."""
    if len(between) > 120 or _SENTENCE_END.search(between + " "):
        return False
    words = _JOINT_DRESSING.sub(lambda m: f" {m[1] or m[2] or ''} ", between)
    if _CORRECTED.search(words):
        return False
    return len(words.split()) <= 5


def _minus_before(before: str) -> bool:
    """Whether a minus sign stands before a box: not a dash, and not the mark of a list item."""
    if "-" not in before[-20:] and before.isascii():
        return False
    match = _MINUS.search(before[-20:])
    if match is None:
        return False
    head = before[: len(before) - len(match[0])]
    line = head.rsplit("\n", 1)[-1].rstrip(" \t")
    spaced = match[0][1:2].isspace()
    if not line:
        return not spaced
    if spaced:
        return line[-1] in "=({,$" or line.endswith(("\\(", "\\[", "is"))
    return not line[-1].isdigit() and (head[-1].isspace() or line[-1] in "=({,$:*" or line.endswith(("\\(", "\\[")))


def balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes what opened just before it; None when none does."""
    end = text.find("}", start)
    if end >= 0 and text.find("{", start, end) < 0 and text.find("\\", start, end) < 0:
        return text[start:end]
    depth = 1
    i = start
    while i < len(text):
        char = text[i]
        if char == "\\":
            i += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
        i += 1
    return None
