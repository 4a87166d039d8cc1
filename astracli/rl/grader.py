"""Is a completion's final answer the right one? The rules for mathematics, without processes and time limits.

The answer is the last `\\boxed{...}`, or the formula in a `final answer is $...$` behind it; a completion without any
box is read by its last number, or as a whole when it is one bare expression, unless the box is
required. Two plain integers are compared as text (`quick`); everything else goes to math-verify (`thorough`), which may
take for ever on a hostile input: call it where it can be killed (`astracli.rl.reward.GradePool`).
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from astracli.rl import answer_forms

if TYPE_CHECKING:
    from astracli.rl.types import Verdict

Extraction = Literal["boxed_or_last_number", "boxed"]

_BOX = re.compile(r"\\f?boxed\s*\{")
_ANNOUNCED = re.compile(r"final answer is:?\s*\$[^$\n]+\$", re.IGNORECASE)
_NEGATED = re.compile(r"(?:^|[=\s$({,])-\\*$")
"""What stands before a box whose minus sign was left outside: `x = -\\boxed{3}`."""
_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)\.?", re.ASCII)
_BARE_BEFORE = frozenset(" \t\n$=:(€£*")
_BARE_AFTER = re.compile(r"\.?(?:[\s$,;:!?)*]|$)")
_DRESSING = str.maketrans("", "", "$ \t\n\r")


def grade_math(gold: str, text: str, extraction: Extraction = "boxed_or_last_number") -> Verdict:
    """`right`, `wrong`, `no_answer` (nothing to read) or `error` (math-verify failed on it)."""
    verdict = quick(gold, text, extraction)
    return thorough(gold, text, extraction) if verdict is None else verdict


def grade_number(gold: str, text: str) -> Verdict:
    """The last box, else the last number, against a gold integer: as it is written, nothing is worked out.

    For generated arithmetic, where the question is an expression of the answer's value: math-verify calls `90+59 is a
    sum` right for 149, and a policy learns to repeat the question (measured, docs/benchmarks.md).
    """
    answer, _ = read_answer(text, "boxed_or_last_number")
    if answer is None:
        return "no_answer"
    found = integer(answer)
    return "right" if found is not None and found == integer(gold) else "wrong"


def quick(gold: str, text: str, extraction: Extraction = "boxed_or_last_number") -> Verdict | None:
    """The verdict when no algebra is needed, else None. Linear in the text; never slow."""
    if announced(text, extraction) is not None:
        return None
    answer, boxed = read_answer(text, extraction)
    if answer is None:
        return "no_answer" if boxed or extraction == "boxed" or not _readable(text) else None
    wanted, found = integer(gold), integer(answer)
    if wanted is not None and found is not None:
        if wanted == found and (boxed or _ends_bare(text)):
            return "right"
        return "wrong" if boxed else None
    return "right" if boxed and answer.strip() == gold.strip() else None


def thorough(gold: str, text: str, extraction: Extraction = "boxed_or_last_number") -> Verdict:
    """The verdict by math-verify, for what `quick` leaves open; where it says no, by the forms of `answer_forms`."""
    last_words = announced(text, extraction)
    answer, boxed = read_answer(text, extraction)
    if not boxed and extraction != "boxed" and (whole := answer_forms.bare(text)) is not None:
        answer, boxed, text = whole, True, f"\\boxed{{{whole}}}"
        if whole.strip() == gold.strip():
            return "right"
    one_box = boxed and last_words is None and len(_BOX.findall(text)) == 1
    if last_words is not None:
        text = last_words
    try:
        verdict = _verified(gold, f"\\boxed{{{answer}}}" if one_box else text)
    except Exception:
        verdict = "error"
    if verdict == "right" or not boxed or answer is None or last_words is not None:
        return verdict
    return "right" if _mended(gold, answer) else verdict


def _verified(gold: str, text: str) -> Verdict:
    parse, verify = load_math_verify()
    found = parse(text, parsing_timeout=None)
    if not found:
        return "no_answer"
    # A set answers for its inequality, in both directions: `(1, 2)` and `1 < x < 2`.
    return "right" if verify(_parse_gold(gold), found, timeout_seconds=None, allow_set_relation_comp=True) else "wrong"


def _mended(gold: str, answer: str) -> bool:
    if answer_forms.same_choice(gold, answer):
        return True
    for other_gold, other_answer in answer_forms.rewritten(gold, answer):
        try:
            if _verified(other_gold, f"\\boxed{{{other_answer}}}") == "right":
                return True
        except Exception:
            continue  # the verdict of the answer as it was written stands
    return False


def announced(text: str, extraction: Extraction) -> str | None:
    """`final answer is $10,455$` and what follows, when it stands behind the last box and says no box itself."""
    if extraction == "boxed":
        return None
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    said = list(_ANNOUNCED.finditer(text, boxes[-1].end()))
    return text[said[-1].start() :] if said else None


def read_answer(text: str, extraction: Extraction) -> tuple[str | None, bool]:
    """The final answer as written, and whether it stood in a box.

    The last box counts, and one that is never closed holds no answer: (None, True).
    """
    boxes = list(_BOX.finditer(text))
    if boxes:
        content = _balanced(text, boxes[-1].end())
        if content is None or not content.strip():
            return None, True
        return ("-" if _NEGATED.search(text, 0, boxes[-1].start()) else "") + content, True
    if extraction == "boxed":
        return None, False
    numbers = _NUMBER.findall(text)
    return (numbers[-1] if numbers else None), False


def integer(text: str) -> str | None:
    """The canonical form of a plain integer (`$ +1,024.$` -> `1024`, `007` -> `7`, `-0` -> `0`), else None."""
    plain = text.translate(_DRESSING).replace("{,}", ",").replace("\\!", "").replace("−", "-")
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def math_verify_loaded() -> bool:
    return "math_verify" in sys.modules


@lru_cache(maxsize=1)
def load_math_verify() -> tuple[Any, Any]:
    """(parse, verify). Importing it takes about a second, so nothing does until an answer needs it."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return parse, verify


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> Any:
    """Golds are wrapped in a box: math-verify reads bare ones as prose."""
    parse, _ = load_math_verify()
    wrapped = gold if "\\boxed" in gold else f"\\boxed{{{gold.strip().strip('$')}}}"
    return parse(wrapped, parsing_timeout=None)


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes what opened just before it; None when none does."""
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


def _ends_bare(text: str) -> bool:
    """Whether the last number stands alone, not inside a formula such as `8/3` or `\\sqrt{5}`."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return False
    last = numbers[-1]
    before = text[last.start() - 1 : last.start()]
    if before == "(" and text[: last.start() - 1].rstrip().endswith(("*", "^", "/", "+", "-", "=")):
        return False  # `10 ** (-2)`
    return (not before or before in _BARE_BEFORE) and _BARE_AFTER.match(text, last.end()) is not None


def _readable(text: str) -> bool:
    """Whether prose without a number may still hold an answer: a formula, or a word after 'answer'."""
    return "$" in text or "\\" in text or "answer" in text.lower()
