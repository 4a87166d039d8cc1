"""Is a completion's final answer the right one? The rules for mathematics, without processes and time limits.

Three steps, each for what the one before leaves open: two plain integers are compared as text (`quick`); an answer and
a gold that `rewards.grading` reads are compared by type (`thorough`); the rest goes to math-verify, which may never
return on a hostile input: call it where it can be killed (`astracli.rewards.reward.GradePool`). The conventions are in
docs/grading.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from astracli.rewards.grading import algebra, choices, endings, extraction, question, typed, values
from astracli.rewards.grading.conventions import DEFAULTS, Conventions
from astracli.rewards.grading.endings import ExtractedAnswer
from astracli.rewards.grading.extraction import Extraction, announced, read_answer
from astracli.rewards.grading.phrases import as_words, is_yes_or_no

if TYPE_CHECKING:
    from astracli.rl.types import Verdict

__all__ = ["Extraction", "announced", "grade_math", "grade_number", "integer", "quick", "read_answer", "thorough"]

_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)\.?", re.ASCII)
_WORDS = re.compile(r"\s*(?:\\(?:text\w*|mathrm)\{)?\s*[A-Za-z]{2}[A-Za-z ,'-]*\}?\s*")
_AROUND = "$ \t\n\r"


def grade_math(
    gold: str,
    text: str,
    where: Extraction = "boxed_or_last_number",
    problem: str = "",
    conventions: Conventions = DEFAULTS,
) -> Verdict:
    """`right`, `wrong`, `no_answer` (nothing to read) or `error` (math-verify failed on it)."""
    verdict = quick(gold, text, where)
    return thorough(gold, text, where, problem, conventions) if verdict is None else verdict


def grade_number(gold: str, text: str) -> Verdict:
    """The last box, else the last number, against a gold integer: as it is written, nothing is worked out.

    For generated arithmetic, where the question is an expression of the answer's value.
    """
    answer, _ = read_answer(text, "boxed_or_last_number")
    if answer is None:
        return "no_answer"
    found = integer(answer)
    return "right" if found is not None and found == integer(gold) else "wrong"


def quick(gold: str, text: str, where: Extraction = "boxed_or_last_number") -> Verdict | None:
    """The verdict when no algebra is needed, else None. Linear in the text; never slow."""
    text = extraction.without_thinking(text)
    if where != "boxed" and "<" in text and extraction.tagged(text):
        return None
    answer, boxed = read_answer(text, where)
    if boxed and where != "boxed" and announced(text, where) is not None:
        return None
    if answer is None:
        return "no_answer" if boxed or where == "boxed" or not (_readable(text) or _WORDS.fullmatch(gold)) else None
    if not boxed:
        return None
    wanted, found = integer(gold), integer(answer)
    if wanted is not None and found is not None:
        return "right" if wanted == found else "wrong"
    return "right" if answer.strip() == gold.strip() else None


def thorough(
    gold: str,
    text: str,
    where: Extraction = "boxed_or_last_number",
    problem: str = "",
    conventions: Conventions = DEFAULTS,
) -> Verdict:
    """The verdict by the types of gold and answer, and by math-verify where one of them is not readable."""
    found = extraction.find(text, where)
    if found.place in ("none", "number", "formula") and where != "boxed" and integer(gold) is None:
        said = _in_words(gold, extraction.without_thinking(text))
        found = ExtractedAnswer(said, "said", said) if said else found
    if not found.text:
        if found.place == "none" and found.last_words and _readable(found.last_words):
            return _by_math_verify(gold, found.last_words)
        return "no_answer"
    try:
        right = typed.verdict(gold, found.text, problem, conventions)
        if right is None and found.place == "whole":
            found = endings.unannounced(text)
            right = typed.verdict(gold, found.text, problem, conventions) if found.text else None
    except (values.Undefined, RecursionError):
        return "wrong"
    if found.place == "number" and not (right and endings.ends_bare(found.last_words)):
        measured = right is False and not found.text[-1].isdigit()  # `12 meters` for 12 cm
        return (
            "wrong"
            if measured or (not right and integer(gold) is not None)
            else _by_math_verify(gold, found.last_words)
        )
    if right is None and (question.repeated(problem, found.text) or typed.hedged(gold, found.text)):
        return "wrong"
    if right is None and found.place in ("said", "tag") and (number := endings.only_number(found.text)):
        right = typed.verdict(gold, number, problem, conventions)
    if right is None and found.place != "formula" and typed.only_words(gold, found.text):
        return "wrong"
    if right is None:
        verdict = _by_math_verify(gold, f"\\boxed{{{found.text}}}")
        if verdict == "no_answer" and found.place not in ("box", "whole") and found.last_words:
            verdict = _by_math_verify(gold, found.last_words)
        return verdict
    return "right" if right else "wrong"


def _in_words(gold: str, text: str) -> str:
    """What a completion without an announcement answers to a gold that is a word or the letter of a choice."""
    if choices.letters(gold):
        return endings.letter_set_bold(text)
    words = typed.words_of(gold)
    said = endings.worded(text, is_yes_or_no(words)) if words else ""
    return said if said and as_words(said) is not None else ""


def _by_math_verify(gold: str, text: str) -> Verdict:
    try:
        right = algebra.verified(gold, text)
    except Exception:
        return "error"
    return "no_answer" if right is None else "right" if right else "wrong"


def integer(text: str) -> str | None:
    """The canonical form of a plain integer (`$ +1,024.$` -> `1024`, `007` -> `7`, `-0` -> `0`), else None."""
    plain = text.strip(_AROUND).replace("{,}", ",").replace("\\!", "").replace("−", "-")
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _readable(text: str) -> bool:
    """Whether prose without a number may still hold an answer: a formula, or a word after 'answer'."""
    return (
        "$" in text
        or "\\" in text
        or not text.isascii()
        or extraction.announces(text)
        or extraction.bare(text) is not None
    )
