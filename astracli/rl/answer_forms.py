"""Forms of one answer that math-verify takes for different ones, each brought to the form of the other side.

Every rule is about a way of writing, none about a problem: percent signs that only one side has, a list in brackets
against the bare list in its order, `4.5e33`, an approximation behind the exact value, the text behind the letter of a
choice. They are tried only after math-verify said no, so that they can mend its verdict and not overrule a yes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|percent)\s*$", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+", re.ASCII)
_E_NOTATION = re.compile(r"(?<![\w.\\])([-+]?\d+(?:\.\d+)?)[eE]([-+]?)0*(\d+)(?!\w)", re.ASCII)
_APPROXIMATION = re.compile(r"\s*(?:\\approx|≈)(?![a-zA-Z]).*$", re.DOTALL)
_DRESSED_LETTER = re.compile(
    r"(?:\\(?:text|textbf|mathbf|mathrm|textit|bf)\s*\{?)?\s*\(?\s*([A-J])\s*\)?\s*\}?", re.ASCII
)
_CHOICE = re.compile(
    r"\s*\$?(?:\\(?:text|textbf|mathbf|mathrm|textit|bf)\s*\{\s*)?"
    r"(?:\(\s*(?P<a>[A-J])\s*\)|(?P<b>[A-J])\s*(?:[.:)]|(?=\}(?![A-Za-z]))|$|\\))",
    re.ASCII,
)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "lim",
        "max",
        "min",
        "mod",
    ]
)
BARE_LIMIT = 200
"""Longest text, in characters, that can be an answer and nothing else."""


def clean(text: str) -> str:
    """An answer without the dollar signs and spaces around it."""
    return text.strip().strip("$").strip()


def same_choice(gold: str, answer: str) -> bool:
    """Whether the gold is a letter from A to J, and the answer the same letter with or without its text behind it.

    `B` is `(B)`, `\\textbf{(B)}\\ 12` and `B. twelve`; a word that starts with B is not.
    """
    letter = _DRESSED_LETTER.fullmatch(clean(gold))
    chosen = _CHOICE.match(answer)
    return letter is not None and chosen is not None and letter[1] == (chosen["a"] or chosen["b"])


def rewritten(gold: str, answer: str) -> Iterator[tuple[str, str]]:
    """(gold, answer) with one difference of form after the other taken away; nothing when no rule applies."""
    before = gold, answer = clean(gold), clean(answer)
    gold, answer = _powers(gold), _powers(answer)
    if "\\approx" not in gold and "≈" not in gold and _APPROXIMATION.sub("", answer):
        answer = _APPROXIMATION.sub("", answer)
    gold, answer = _same_percent(gold, answer)
    if (gold, answer) != before:
        yield gold, answer
    if _listed(gold) and _is_bare_list(answer):
        yield f"({gold[1:-1]})", f"({answer})"


def bare(text: str) -> str | None:
    """The whole text as an answer when it is one expression and no prose (`\\dfrac{1}{3}`), else None."""
    text = text.strip()
    if not text or len(text) > BARE_LIMIT or "\n" in text or "$" in text or "\\(" in text or "\\[" in text:
        return None
    words = {word.lower() for word in _PROSE.findall(text)}
    return text if words <= _FUNCTIONS or "\\text" in text else None


def _powers(text: str) -> str:
    """`4.5e-3` -> `4.5 \\times 10^{-3}`; math-verify reads Euler's number there."""

    def power(match: re.Match[str]) -> str:
        return f"{match[1]} \\times 10^{{{'-' if match[2] == '-' else ''}{match[3]}}}"

    return _E_NOTATION.sub(power, text)


def _same_percent(gold: str, answer: str) -> tuple[str, str]:
    """A percent sign behind a number that the other side writes as the bare number goes: `50.0\\%` for `50`."""
    plain_gold, plain_answer = _PERCENT.sub("", gold), _PERCENT.sub("", answer)
    one_side = (plain_gold != gold) != (plain_answer != answer)
    if one_side and _NUMBER.fullmatch(plain_gold) and _NUMBER.fullmatch(plain_answer):
        return plain_gold, plain_answer
    return gold, answer


def _listed(gold: str) -> bool:
    """Whether the gold is a list in square brackets; with a round one beside it is an interval."""
    return gold.startswith("[") and gold.endswith("]") and "," in gold and gold.count("[") == 1


def _is_bare_list(answer: str) -> bool:
    return "," in answer and not set(answer) & set("[]()") and "\\{" not in answer
