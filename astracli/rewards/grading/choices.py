"""Letters of multiple choice: which ones an answer names, and whether it names anything else."""

from __future__ import annotations

import re

_LETTER = re.compile(r"[\s({]*([A-J])[\s)}.]*")
_SEPARATED = re.compile(
    r"\s*(?:,|;|\\l(?:or|and)(?![A-Za-z])|\\words\{\s*(?:and|&)\s*\}|(?<![A-Za-z])and(?![A-Za-z])|&)\s*"
)
_FIRST = re.compile(
    r"\s*\{?\s*(?:\(\s*(?P<a>[A-J])\s*\)|(?P<b>[A-J])\s*(?:[.:)]|\}|$|(?=\\words|\s)))\s*\}?(?P<rest>.*)$", re.DOTALL
)
_CALLED = re.compile(r"^\s*(?:\\words\{\s*)?(?:option|choice|answer)\s*\(?([A-J])\)?\s*\}?\s*$", re.IGNORECASE)
_RUN = re.compile(r"[A-J]{2,5}")
_WRAPPED = re.compile(r"\s*\\words\{\s*(\(\s*[A-J]\s*\)[^{}]*|[A-J]\s*[.:)][^{}]*)\}")
_OTHER = re.compile(r"(?<![A-Za-z\\])\(?([A-J])\)?(?![A-Za-z'])")
_PAREN = re.compile(r"\(\s*([A-J])\s*\)")
_LETTERED = re.compile(r"\{?(?:\(\s*([A-J])\s*\)|([A-J])[.)])\}?[:.]?\s*([^\s=,].*)", re.DOTALL)
_DOUBT = re.compile(
    r"(?<![A-Za-z])(?:or|not|no|wait|maybe|perhaps|actually|instead|rather|else|either|and|neither|nor|but|to)(?![A-Za-z])"
    r"|\\lor|\\land|\\cup|\\cap",
    re.IGNORECASE,
)


def letters(text: str) -> frozenset[str] | None:
    """The letters when a text in one notation is nothing but letters of choices, else None: `(B)`, `A, C`, `AC`."""
    text = re.sub(r"\\words\{([^{}]*)\}", r" \1 ", text).strip()
    single = _LETTER.fullmatch(text)
    if single:
        return frozenset(single[1])
    parts = [part for part in _SEPARATED.split(text) if part]
    found = [_LETTER.fullmatch(part) for part in parts]
    if len(parts) > 1 and all(found):
        return frozenset(match[1] for match in found if match)
    return None


def chosen(text: str) -> str | None:
    """The one letter that an answer chooses, with or without the text of the choice behind it, else None.

    `B`, `(B)`, `(B) 12` and `B. twelve` choose B. A second letter, a range, a union or a word of doubt chooses nothing.
    """
    text = _CALLED.sub(r"\1", text)
    wrapped = _WRAPPED.match(text)
    if wrapped:
        text = f"{wrapped[1]} {text[wrapped.end() :]}"
    match = _FIRST.match(text)
    if match is None or re.match(r"\s*\{[A-J]\}[A-Za-z]", text):
        return None
    rest = match["rest"].strip()
    letter = match["a"] or match["b"]
    if not rest:
        return letter
    if (
        match["b"]
        and not match[0][match.end("b") :].lstrip().startswith((".", ":", ")", "}"))
        and not rest.startswith("\\words")
    ):
        return None  # `A good question`, `C - D`
    if rest.startswith(("-", ",", "/", "&", ";", "~", "\\cup", "\\cap", "\\sim")):
        return None
    doubt = _DOUBT.search(re.sub(r"\\words\{([^{}]*)\}", r" \1 ", rest))
    others = {other for other in _OTHER.findall(rest) if other != letter}
    if _PAREN.search(rest) or (
        doubt and (others or doubt[0].lower() in ("no", "not", "wait", "maybe", "perhaps", "actually"))
    ):
        return None
    if others and re.fullmatch(r"[\s(),.;A-J\\]*(?:\\words\{[^{}]*\}[\s(),.;A-J]*)?", rest):
        return None
    return letter


def lettered(text: str) -> tuple[str, str] | None:
    """(letter, text) of a choice written with its text, `(C) 17` or `C. 17`, else None."""
    match = _LETTERED.fullmatch(text.strip())
    if match is None or chosen(text) is None:
        return None
    return match[1] or match[2], match[3].strip()


def run_of_letters(text: str) -> frozenset[str] | None:
    """The letters of `ABD`: two to five different ones in the order of the alphabet, else None."""
    text = text.strip()
    return frozenset(text) if _RUN.fullmatch(text) and list(text) == sorted(set(text)) else None
