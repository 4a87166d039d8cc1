"""The verdict on an answer by its type: both sides are read, and compared when both could be."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from astracli.rewards.grading import boxes, choices, notation, question, values
from astracli.rewards.grading.answer_types import Answer, Assigned, Dots, Several, Value, Words, variables
from astracli.rewards.grading.answers import read
from astracli.rewards.grading.compare import equal
from astracli.rewards.grading.conventions import DEFAULTS, Conventions
from astracli.rewards.grading.phrases import as_words, is_yes_or_no, says, split
from astracli.rewards.grading.trees import TooLarge, Unreadable

_OPTION = re.compile(
    r"(?:\(([A-J])\)|(?<![A-Za-z])([A-J])[.):])\s*(.*?)"
    r"(?=(?:\\q?quad|\s|\$|\\\\|~)*(?:\\text(?:bf|rm)?\{|\\mathrm\{)?\(?(?<![A-Za-z])[A-J]\)?[.):]|\n|$)",
    re.DOTALL,
)
_HEDGE = re.compile(
    r"\b(?:between|either|neither|or|at least|at most|more than|less than|not|from|to|maybe|perhaps|possibly|wait)\b"
    r"|[?|;&]|^\s*(?:\\[gl]eq?(?![a-z])|[<>≤≥])|\\\\",
    re.IGNORECASE,
)
_DOUBT = re.compile(r"\b(?:maybe|perhaps|possibly|wait|not|either|neither|between|everything)\b|\?", re.IGNORECASE)
_SECOND = re.compile(r"\\words\{[^{}]*\}(?:\^\{?\d\}?)?[^^_{}]*(?:\d|\\frac|\\sqrt)")
"""A number behind the words behind a number."""
_ANNOUNCED = re.compile(
    r"^(?:\\words\{\s*)?(?:(?:so|thus|hence|therefore),?\s+)?the\s+(?:final\s+)?(?:answer|result|value)"
    r"\s+(?:is|=)\s*:?\s*\}?(?![^{]*\})\s*",
    re.IGNORECASE,
)
_TENS = re.compile(r"\\log\s*_\s*(?:\{\s*10\s*\}|10(?!\d))|\\lg(?![A-Za-z])")
"""The logarithm to the base 10, which books also write without its base."""
_NAME_ONLY = re.compile(r"[A-Za-z\\]*\s*(?:=)?\s*")


def verdict(gold: str, answer: str, problem: str = "", conventions: Conventions = DEFAULTS) -> bool | None:
    """Whether the answer is right; None when one of the two is written in a way that is not known here.

    Raises values.Undefined when a value cannot be worked out.
    """
    if answer.strip() == gold.strip() and gold.strip().isdigit():
        return True
    if len(answer) > 4000 + 4 * len(gold):
        return False
    if "\\boxed" in gold:
        gold = boxes.boxed(gold) or gold
    wanted, found = notation.plain(gold), _ANNOUNCED.sub("", notation.plain(answer))
    if not found:
        return False
    chosen = _choice(wanted, found, problem, conventions)
    if chosen is not None:
        return chosen
    if wanted == found:
        return True
    if (letter := choices.chosen(found)) and found.strip(" ().") == letter and letter in _options(problem):
        found = notation.plain(_options(problem)[letter])
    words = as_words(wanted)
    if words is not None and words == as_words(found):
        return True
    if words is not None and is_yes_or_no(words) and says(words, found):
        return True
    conventions = replace(
        conventions, percent_asked=question.percent_asked(problem), list_asked=question.list_asked(problem)
    )
    return _compared(wanted, found, problem, conventions)


def hedged(gold: str, answer: str) -> bool:
    """Whether an answer that is not readable is a range or a choice of answers where the gold is one value."""
    wanted = _gold(notation.plain(gold))
    if wanted is None or isinstance(wanted, Words):
        return False
    if isinstance(wanted, (Value, Assigned)):
        return _HEDGE.search(answer) is not None or _SECOND.search(notation.plain(answer)) is not None
    return _DOUBT.search(answer) is not None


def only_words(gold: str, answer: str) -> bool:
    """Whether an answer is words where the gold is a number."""
    wanted = _gold(notation.plain(gold))
    return isinstance(wanted, Value) and not variables(wanted) and as_words(notation.plain(answer)) is not None


def words_of(gold: str) -> str | None:
    """A gold that is words and no value, as comparable words."""
    plain = notation.plain(gold)
    words = as_words(plain)
    return words if is_yes_or_no(words) or isinstance(_gold(plain), Words) else None


def reads(gold: str) -> bool:
    """Whether a gold in one notation is an answer of a known type."""
    return _gold(gold) is not None


def _choice(gold: str, answer: str, problem: str, conventions: Conventions) -> bool | None:
    """The verdict when the gold is letters of choices."""
    lettered = choices.lettered(gold)
    if lettered is not None:
        return _choice_with_text(*lettered, answer, conventions)
    wanted = choices.letters(gold)
    named = choices.letters(answer)
    if wanted is None and named is not None and len(named) > 1:
        wanted = choices.run_of_letters(gold)
    if wanted is None:
        return None
    named = named or (choices.run_of_letters(answer) if len(wanted) > 1 else None)
    if named is not None:
        return named == wanted
    if len(wanted) > 1:
        return False
    if choices.chosen(answer) in wanted:
        return True
    text = _options(problem).get(next(iter(wanted)))
    return bool(text) and choices.chosen(answer) is None and verdict(str(text), answer, "", conventions) is True


def _choice_with_text(letter: str, text: str, answer: str, conventions: Conventions) -> bool:
    """The verdict for a gold such as `(C) 17`: letter, text or both."""
    both = choices.lettered(answer)
    if both is not None:
        return both[0] == letter and (both[1] == text or verdict(text, both[1], "", conventions) is not False)
    if choices.letters(answer) is not None or choices.chosen(answer) is not None:
        return choices.letters(answer) == {letter} or choices.chosen(answer) == letter
    return verdict(text, answer, "", conventions) is True


@lru_cache(maxsize=256)
def _options(problem: str) -> dict[str, str]:
    """The texts of a problem's choices; empty when it has none."""
    found = {(m[1] or m[2]): m[3].strip(" $~,;").rstrip("\\ $~,;") for m in _OPTION.finditer(problem[-2000:])}
    return found if "A" in found and "B" in found else {}


def _compared(gold: str, answer: str, problem: str, conventions: Conventions) -> bool | None:
    """The verdict under both readings of digits with commas: a number, or a list."""
    joined = notation.without_separators(gold), notation.without_separators(answer)
    right = _one_reading(*joined, problem, conventions)
    if not right and joined != (gold, answer) and _one_reading(gold, answer, problem, conventions):
        return True
    return right


def _one_reading(gold: str, answer: str, problem: str, conventions: Conventions) -> bool | None:
    wanted = _gold(gold)
    if wanted is None:
        return None
    before, after = _approximation(answer)
    found = _answer(before, wanted)
    if found is None:
        return None
    if isinstance(wanted, Words) or isinstance(found, Words):
        return wanted == found
    if _elided(found) and not _elided(wanted):
        return False
    wanted = _with_unit(gold, wanted, found)
    right = equal(wanted, found, conventions)
    if right and question.unfinished(problem, wanted, found):
        return False
    if not right and r"\ln" not in gold + answer and (_TENS.search(gold) is None) != (_TENS.search(answer) is None):
        return _one_reading(_TENS.sub(r"\\log ", gold), _TENS.sub(r"\\log ", answer), problem, conventions)
    if right or after is None:
        return right or _decimal_comma(gold, answer)
    rounded = _answer(after, wanted)
    if rounded is None or not equal(wanted, rounded, conventions):
        return False
    loose = Conventions(relative_tolerance=0.01)
    return isinstance(found, Value) and isinstance(rounded, Value) and equal(rounded, found, loose)


def _with_unit(gold: str, wanted: Answer, found: Answer) -> Answer:
    """The gold `5 m` as a length, not as a variable, when the answer has a unit of the same kind."""
    if not (isinstance(found, Value) and found.unit and isinstance(wanted, Value) and not wanted.unit):
        return wanted
    measured = _answer(gold, found)
    if isinstance(measured, Value) and measured.unit and not variables(measured) and variables(wanted):
        return measured
    return wanted


@lru_cache(maxsize=4096)
def _gold(gold: str) -> Answer | None:
    if "$" in gold[1:] or len(gold) > 300:
        return None
    try:
        return read(_approximation(gold)[0])
    except Unreadable:
        return None


def _answer(text: str, gold: Answer) -> Answer | None:
    try:
        return read(text, single_units=not variables(gold))
    except TooLarge as error:
        raise values.Undefined(str(error)) from None
    except Unreadable:
        return None


def _approximation(text: str) -> tuple[str, str | None]:
    """(exact part, rounded part) of `\\frac13 \\approx 0.33`; (value, None) without a sign or an exact part."""
    parts = split(text, r"\approx")
    if len(parts) < 2:
        return text, None
    if _NAME_ONLY.fullmatch(parts[0]):
        return parts[-1], None
    return parts[0].rstrip("= "), parts[-1]


def _elided(answer: Answer) -> bool:
    """Whether an answer is a list with an ellipsis in it."""
    return isinstance(answer, Several) and Dots() in answer.items


def _decimal_comma(gold: str, answer: str) -> bool:
    """`2,74` for 2.74."""
    return bool(re.fullmatch(r"-?\d+,\d+", answer)) and answer.replace(",", ".") == gold
