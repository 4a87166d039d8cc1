"""What the text of a problem says about its answer: a percentage, a list, or an expression to be worked out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache

from astracli.rewards.grading import notation, values
from astracli.rewards.grading.answer_types import Answer, Assigned, Several, Value
from astracli.rewards.grading.expressions import parse
from astracli.rewards.grading.phrases import split
from astracli.rewards.grading.trees import Node, Unreadable, canonical, unknowns, walk

_PERCENT = re.compile(
    r"\b(?:what|which|find the|how many)\s+(?:is\s+the\s+|are\s+the\s+)?(?:[a-z-]+\s+){0,3}?percent(?:age|s)?\b"
    r"|\bas an?\s+(?:[a-z]+\s+)?percent(?:age)?\b|\bin percent\b|百分之几|百分比是|百分率",
    re.IGNORECASE,
)
_LIST = re.compile(
    r"\b(?:factors|divisors|solve|solutions?|roots?|zeros|list|elements|given that|determine|calculate|what is)\b",
    re.IGNORECASE,
)
_RANGE = re.compile(
    r"interval|range|domain|inequalit|values? of|[<>≤≥]|\\[lg]eq?(?![a-z])|\\[lg]t(?![a-z])", re.IGNORECASE
)
_CONVERT = re.compile(
    r"as an? (?:exact )?(?:decimal|percent\w*|mixed number)|to an? (?:decimal|percent\w*|mixed number)", re.IGNORECASE
)
_ARITHMETIC = re.compile(r"[-(]*\d[\d\s.,()+*/^×÷·−–-]*[\d)!]")
_LONG = 6000


def percent_asked(problem: str) -> bool:
    return _PERCENT.search(problem) is not None


def list_asked(problem: str) -> bool:
    """Whether the problem asks for single values, so that square brackets are a list and no interval."""
    return _LIST.search(problem) is not None and _RANGE.search(problem) is None


def unfinished(problem: str, gold: Answer, answer: Answer) -> bool:
    """Whether an answer of the right value is the question again, or arithmetic that was to be worked out.

    It is not where the gold is written in the same way.
    """
    mine, theirs = _node(gold), _node(answer)
    if mine is None or theirs is None or _is_literal(theirs):
        return False
    form = canonical(theirs)
    if form == canonical(mine):
        return False
    if _is_integer(mine) and _integers_only(theirs):
        return True
    expressions = _expressions(problem[:_LONG]) if problem else ()
    unsigned = theirs[1] if theirs[0] == "neg" else theirs
    fraction = unsigned[0] == "div" and _is_literal(unsigned[1]) and _is_literal(unsigned[2])
    if any(canonical(each) == form for each in expressions):
        return not fraction or not _lowest(unsigned) or _CONVERT.search(problem) is not None
    if (fraction and not _is_integer(mine)) or unknowns(mine):
        return False
    if _operations(theirs) <= _operations(mine):
        return False
    return any(_asks_for(each, mine) for each in expressions)


def repeated(problem: str, answer: str) -> bool:
    """Whether an answer, in whatever notation, is a formula of the problem letter by letter."""
    plain = re.sub(r"\s", "", notation.plain(answer))
    if len(plain) > 12 and plain[:200] in re.sub(r"\s", "", notation.plain(problem)):
        return True
    return bool(plain) and any(re.sub(r"\s", "", notation.plain(text)) == plain for text in _formulas(problem[:_LONG]))


def _node(answer: Answer) -> Node | None:
    if isinstance(answer, Assigned):
        answer = answer.value
    if isinstance(answer, Several) and len(answer.items) == 1:
        answer = answer.items[0]
    if not isinstance(answer, Value):
        return None
    return ("fn", "degree", answer.node) if answer.unit == "degree" and not _is_literal(answer.node) else answer.node


def _is_literal(node: Node) -> bool:
    """A number as it is written at the end: digits, a sign, a mixed number, scientific notation."""
    if node[0] == "neg":
        return _is_literal(node[1])
    if node[0] == "mul" and len(node) == 3 and node[1][0] == "num":
        node = node[2]
        return node[0] == "pow" and node[1][:2] == ("num", 10) and _is_literal(node[2])
    return node[0] in ("num", "sym")


def _lowest(fraction: Node) -> bool:
    top, bottom = values.exact(fraction[1]), values.exact(fraction[2])
    if top is None or bottom is None or bottom == 0 or top.denominator != 1 or bottom.denominator != 1:
        return True
    return math.gcd(int(top), int(bottom)) == 1


def _is_integer(node: Node) -> bool:
    return (
        _is_literal(node) and node[0] != "sym" and (value := values.exact(node)) is not None and value.denominator == 1
    )


def _integers_only(node: Node) -> bool:
    """A sum, difference or product of integers, not worked out."""
    if node[0] == "num":
        return bool(node[1].denominator == 1)
    return node[0] in ("add", "mul", "neg") and all(_integers_only(part) for part in node[1:])


def _operations(node: Node) -> set[str]:
    return {f"fn {part[1]}" if part[0] == "fn" else part[0] for part in walk(node)} - {"num", "sym", "neg"}


def _asks_for(expression: Node, gold: Node) -> bool:
    """Whether the gold is the value of an expression in the problem."""
    if _is_literal(expression) or unknowns(expression):
        return False
    try:
        return values.same(gold, expression)
    except values.Undefined:
        return False


@lru_cache(maxsize=512)
def _expressions(problem: str) -> tuple[Node, ...]:
    """The formulas of a problem, and its arithmetic outside formulas, as trees."""
    found = []
    for text in _formulas(problem):
        for side in re.split(r"(?<![\\<>!=])=(?!=)|\\approx|\?", notation.plain(text)):
            for part in split(side, ","):
                try:
                    found.append(parse(part.strip(" .;:")))
                except Unreadable:
                    continue
    return tuple(found)


def _formulas(problem: str) -> Iterator[str]:
    for match in notation.MATH.finditer(problem):
        yield notation.content_of(match)
    prose = notation.MATH.sub(" ", problem)
    for match in _ARITHMETIC.finditer(prose):
        yield match[0]
    if len(problem) <= 200 and not notation.MATH.search(problem):
        yield from re.findall(
            r"(?:of|evaluate|compute|simplify|expand|factor|calculate|find|is)\s+([^?.]+)", problem, re.IGNORECASE
        )
