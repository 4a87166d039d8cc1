"""Parts of an answer before it is read: splitting outside brackets, and words."""

from __future__ import annotations

import re

ALL_REALS = re.compile(
    r"(?:all|any|every)\s+(?:the\s+)?reals?(?:\s+numbers?)?(?:\s+[a-z]\b)?|reals|real numbers|全体实数|一切实数"
)
NOTHING = re.compile(
    r"(?:there\s+(?:is|are)\s+)?(?:no\s+(?:real\s+|such\s+)?(?:solutions?|values?|roots?)|(?:the\s+)?empty\s+set|无解|空集)",
    re.IGNORECASE,
)
INFINITE = re.compile(
    r"infinity|(?:there\s+are\s+)?(?:infinitely many|(?:an )?infinite(?: number of| amount of)?)"
    r"(?:\s+(?:real\s+)?(?:solutions?|values?|roots?|pairs?))?",
    re.IGNORECASE,
)
_SYNONYMS = {"dne": "does not exist", "doesn't exist": "does not exist", "not exist": "does not exist"}
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
EXCEPT = re.compile(r"\s*(?:except|other than|excluding|but not|but)\s+(?:for\s+)?")
OPENING = "([{"
CLOSING = ")]}"


def split(text: str, separator: str) -> list[str]:
    """The parts between separators outside all brackets. Brackets of intervals need not match."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text.startswith(separator, i) and depth <= 0 and not _continues(text, i, separator):
            parts.append(text[start:i])
            i += len(separator)
            start = i
            continue
        if text[i] in OPENING or text.startswith((r"\langle", r"\lfloor", r"\lceil", r"\begin"), i):
            depth += 1
        elif text[i] in CLOSING or text.startswith((r"\rangle", r"\rfloor", r"\rceil", r"\end"), i):
            depth -= 1
        i += 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def _continues(text: str, place: int, separator: str) -> bool:
    """Whether a command goes on behind the separator (`\\in` in `\\infty`), or an escape stands before it."""
    after = text[place + len(separator) : place + len(separator) + 1]
    return (separator.startswith("\\") and after.isalpha()) or (
        place > 0 and text[place - 1] == "\\" and separator in ",;"
    )


def encloses(text: str) -> bool:
    """Whether the first bracket closes at the last character."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char in OPENING) - (char in CLOSING)
        if depth == 0:
            return place == len(text) - 1
    return False


def as_words(text: str) -> str | None:
    """Prose as comparable words: no case, no article, no punctuation; None when it is a formula."""
    text = re.sub(r"\\words\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"[{}]", " ", text)
    if re.search(r"[\\^_=<>+*/]", text) or not re.search(r"[^\W\d_]{2}", text):
        return None
    words = " ".join(word for word in re.findall(r"[\w'-]+", text.casefold()) if word not in ("a", "an", "the"))
    if words.endswith(" does not exist") and words.count(" ") < 6:
        return "does not exist"
    return _SYNONYMS.get(words, words)


def is_yes_or_no(gold: str | None) -> bool:
    """Whether a gold, as words, is the answer to a question of yes or no."""
    return gold in _OPPOSITES


def says(gold: str, answer: str) -> bool:
    """Whether prose begins with the gold, which is yes or no, and goes on to explain it: `Yes, it is possible`."""
    text = re.sub(r"\\words\{([^{}]*)\}", r"\1", answer).strip("*_ ").casefold()
    return re.match(rf"{gold}\W*[,.;:!—–-]", text) is not None and not re.search(rf"\b{_OPPOSITES[gold]}\b", text)
