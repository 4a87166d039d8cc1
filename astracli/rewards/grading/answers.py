"""Reading an answer: one notation (`notation.plain`) becomes a type of `answer_types`."""

from __future__ import annotations

import re
from fractions import Fraction

from astracli.rewards.grading import phrases, units
from astracli.rewards.grading.answer_types import (
    Answer,
    Assigned,
    Dots,
    Joined,
    Ratio,
    RealLine,
    Relation,
    Several,
    Value,
    is_interval,
)
from astracli.rewards.grading.expressions import parse
from astracli.rewards.grading.phrases import encloses, split
from astracli.rewards.grading.quantities import mixed, read_quantity
from astracli.rewards.grading.trees import Node, TooLarge, Unreadable

_OPERATORS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", "==": "="}
"""Written otherwise than in `Relation`."""
_BRACKETS = [(r"\{", r"\}"), (r"\langle", r"\rangle"), *("<>", "()", "[]", "[)", "(]")]
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|<=|>=|!=|==?|<|>|\\not\s*=")
_CONNECTIVE = re.compile(
    r"\\words\{\s*,?\s*(or|OR|and|AND)\s*(?:else)?,?\s*\}|\\words\{[^{}]*\}|(?<![A-Za-z\\])(or|and)(?![A-Za-z])"
    r"|或者?|(?<=[\d)}])[和与及](?=[\\\d(-])"
)
_MATRIX = re.compile(r"\\begin\{([pbvB]?matrix|array|smallmatrix)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL)
_ANY_INTEGER = re.compile(r"[a-z]\s*\\in\s*(?:\\mathbb\s*\{?\s*[ZN]\s*\}?|Z)(?:\s*\^\s*\{?\s*[+*]\s*\}?)?")
"""What a general solution says of its parameter: `k \\in \\mathbb{Z}`."""
_TIME = re.compile(
    r"(\d{1,2})(?P<minutes>\s*:\s*\d{2}(?:\s*:\s*\d{2})?)?(?:\s*(?:\\words\{\s*)?(?P<half>[ap]\.?\s?m)\.?\s*\}?)?",
    re.IGNORECASE,
)


def read(text: str, single_units: bool = False) -> Answer:
    """The answer that a text in one notation says. Raises Unreadable."""
    text = _CONNECTIVE.sub(_connective, text.strip())
    if len(text) > 4000:
        raise TooLarge("too long")
    return _read(text, single_units)


def _connective(match: re.Match[str]) -> str:
    """`or` and `and` between answers; longer words stay as they are."""
    word = (match[1] or match[2] or "").lower()
    if not word and match[0].startswith("\\"):
        return match[0]
    return r" \lor " if word == "or" or "或" in match[0] else r" \land "


def _read(text: str, single: bool) -> Answer:
    text = text.strip()
    if not text:
        raise Unreadable("nothing is written")
    special = _special(text)
    if special is not None:
        return special
    for separator in (r"\lor", ";", ",", r"\land"):
        parts = split(text, separator)
        if len(parts) > 1:
            return _joined(separator, parts, single)
    for separator, how in ((r"\cup", "or"), (r"\setminus", "minus"), (r"\cap", "and")):
        parts = split(text, separator)
        if len(parts) > 1:
            return Joined(how, tuple(_read(part, single) for part in parts))
    member = split(text, r"\in")
    if len(member) == 2 and _is_name(member[0]):
        return _read(member[1], single)
    related = _relation(text, single)
    if related is not None:
        return related
    bracketed = _bracketed(text, single)
    if bracketed is not None:
        return bracketed
    return _ratio(text, single) or read_quantity(text, single)


def _joined(separator: str, parts: list[str], single: bool) -> Answer:
    """A list, or conditions joined by a word. `1, 2, and 3` has an empty part between comma and word."""
    parts = [re.sub(r"^\s*\\land\b", "", part).strip() for part in parts]
    if separator in (",", ";"):
        parts = [re.sub(r"\\land\s*$", "", part).strip() for part in parts]
        if separator == "," and len(parts) > 1 and (last := split(parts[-1], r"\land")) and len(last) > 1:
            parts = [*parts[:-1], *last]
    parts = [part for part in parts if part]
    if separator == "," and len(parts) > 1 and _ANY_INTEGER.fullmatch(parts[-1]):
        parts.pop()
    read_parts = tuple(_read(part, single) for part in parts)
    if len(read_parts) == 1:
        return read_parts[0]
    if not read_parts:
        raise Unreadable("nothing is written")
    conditions = all(isinstance(part, (Relation, Joined, RealLine)) or is_interval(part) for part in read_parts)
    if separator == r"\lor":
        return Joined("or", read_parts)
    if conditions and separator in (r"\land", ",") and all(isinstance(p, (Relation, Joined)) for p in read_parts):
        return Joined("and" if separator == r"\land" else "either", read_parts)
    return Several(read_parts)


def _special(text: str) -> Answer | None:
    words = re.sub(r"\\words\{([^{}]*)\}", r" \1 ", text)
    words = " ".join(words.split())
    line = re.fullmatch(r"\\mathbb\s*\{?\s*([RZQNC])\s*\}?", text)
    if line:
        return RealLine(line[1])
    if text in (r"\emptyset", r"\{\}", r"\{ \}") or phrases.NOTHING.fullmatch(words):
        return Several((), "{}")
    if text in (r"\ldots", "...", "..") or re.fullmatch(r"\\ldots\s*", text):
        return Dots()
    if quantity := mixed(text):
        return quantity
    if phrases.INFINITE.fullmatch(words):
        return Value(parse(r"\infty"))
    reals = phrases.ALL_REALS.match(words)
    if reals and reals.end() == len(words):
        return RealLine()
    if reals and (without := phrases.EXCEPT.match(words, reals.end())):
        rest = re.sub(r"^[a-z]\s*=\s*", "", words[without.end() :])
        items = _read(rest.replace(r"\land", ","), False)
        return Joined("minus", (RealLine(), _braced(items)))
    return None


def _braced(answer: Answer) -> Answer:
    if isinstance(answer, Assigned):
        answer = answer.value
    several = isinstance(answer, Several) and not answer.brackets
    return Several(answer.items if isinstance(answer, Several) and several else (answer,), "{}")


def _is_name(text: str) -> bool:
    if re.search(r"\\words\{[^{}]*\b(?:not|no|or|never)\b", text):
        return False
    text = re.sub(r"\\words\{[^{}]*\}", "W", text.strip())
    try:
        text = text[1:-1] if text.startswith("(") and encloses(text) else text
        node = parse(text.replace(",", " ").replace(":", "/"))
    except Unreadable:
        return text.replace(" ", "").isalpha()
    return name_like(node)


def name_like(node: Node) -> bool:
    """Whether a tree names a quantity: letters, a function of letters, a ratio of such, and no numbers or sums."""
    if node[0] in ("sym", "call"):
        return True
    if node[0] in ("mul", "div"):
        return all(name_like(part) for part in node[1:])
    if node[0] == "fn":
        return node[1] in ("abs", "sin", "cos", "tan", "max", "min") and all(name_like(part) for part in node[2:])
    return False


def _relation(text: str, single: bool) -> Answer | None:
    sides, operators, depth, start, i = [], [], 0, 0, 0
    while i < len(text):
        match = _RELATION.match(text, i) if depth <= 0 else None
        if match:
            sides.append(text[start:i].strip())
            operators.append("!=" if "not" in match[0] else _OPERATORS.get(match[0], match[0]))
            i = start = match.end()
            continue
        depth += (text[i] in phrases.OPENING) - (text[i] in phrases.CLOSING)
        i += 1
    if not operators:
        return None
    sides.append(text[start:].strip())
    if not sides[0] and len(sides) == 2 and operators[0] not in ("=", "!="):
        sides[0] = "x"  # `\\ge 2` alone
    if all(operator == "=" for operator in operators) and (found := _assignment(sides, single)) is not None:
        return found
    nodes = []
    for side in sides:
        side, percent = units.take_percent(side)
        side, _ = units.take_unit(side, single)
        node = parse(side)
        nodes.append(("div", node, ("num", Fraction(100), "100")) if percent else node)
    return Relation(tuple(nodes), tuple(operators))


def _assignment(sides: list[str], single: bool) -> Answer | None:
    if not sides[0] or not sides[-1] or not _is_name(sides[0]):
        return None
    value = _read(sides[-1], single)
    try:
        left = parse(sides[0])
    except Unreadable:
        left = None
    return Assigned(re.sub(r"[\s{}]", "", sides[0]), value, left)


def _bracketed(text: str, single: bool) -> Answer | None:
    """What stands in brackets that enclose the whole text and a comma, or braces around anything."""
    matrix = _MATRIX.fullmatch(re.sub(r"^[\[(](\\begin.*)[\])]$", r"\1", text, flags=re.DOTALL))
    if matrix:
        return _matrix(matrix[2], single)
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)].strip()
            if closing == ")" and opening == "(" and not encloses(text):
                return None
            if opening == "\\{":
                return _set(inner, single)
            parts = split(inner, ",")
            if len(parts) < 2:
                if opening == "[" and closing == "]" and encloses(text):
                    return Several((_read(inner, single),), "[]")
                if opening == "(" and closing == ")" and ("\\words" in inner or _RELATION.search(inner)):
                    return _read(inner, single)
                continue
            if not all(parts):
                raise Unreadable("a part is empty")
            brackets = "<>" if opening in (r"\langle", "<") else opening + closing
            return Several(tuple(_read(part, single) for part in parts), brackets)
    if re.fullmatch(r"\][^\[\]]+,[^\[\]]+\[", text):
        return Several(tuple(_read(part, single) for part in split(text[1:-1], ",")), "()")
    if text.startswith("{") and text.endswith("}") and encloses(text) and "," in text:
        return _read(text[1:-1], single)
    return None


def _set(inner: str, single: bool) -> Answer:
    if not inner:
        return Several((), "{}")
    for bar in ("|", ":", r"\mid"):
        parts = split(inner, bar)
        if len(parts) == 2 and (_is_name(parts[0]) or r"\in" in parts[0]):
            return _read(parts[1], single)
    return _braced(_read(inner, single))


def _matrix(body: str, single: bool) -> Answer:
    rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", body)]
    rows = [row for row in rows if row and row != r"\hline"]
    if not rows:
        raise Unreadable("the matrix is empty")
    cells = [tuple(_read(cell, single) for cell in split(row, "&")) for row in rows]
    if all(len(row) == 1 for row in cells):
        return Several(tuple(row[0] for row in cells), "column")
    return Several(tuple(Several(row, "row") for row in cells), "matrix")


def _ratio(text: str, single: bool) -> Answer | None:
    time = _TIME.fullmatch(text)
    if time and (time["minutes"] or (time["half"] and not time[0].isalnum())):
        half = (time["half"] or "")[:1].lower()
        clock = [time[1], *(time["minutes"] or ":00").replace(" ", "")[1:].split(":")]
        return Ratio(tuple(read_quantity(part, False) for part in clock), True, half)
    parts = split(
        re.sub(r"(?<=[\d)}])\s*\\words\{\s*(?:is )?to\s*\}\s*(?=[\\\d({])|(?<=\d)\s+to\s+(?=\d)", ":", text), ":"
    )
    if len(parts) < 2:
        return None
    return Ratio(tuple(_read(part, single) for part in parts if part))
