"""Values with what stands around them (units, percent signs, degrees, plus-minus), ratios and times."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from astracli.rewards.grading import units, values
from astracli.rewards.grading.answer_types import Answer, Assigned, Ratio, Value, Words
from astracli.rewards.grading.conventions import Conventions
from astracli.rewards.grading.expressions import parse
from astracli.rewards.grading.phrases import as_words
from astracli.rewards.grading.trees import Node, Unreadable, rebuilt, symbols, unknowns, walk

_BASED = re.compile(r"\(?(-?\d+)\)?\s*_\s*\{?\s*(\d+)\s*\}?")
_THERMOMETER = re.compile(r"(.*\d)\s*\\degree\s*(?:\\words\{\s*)?(C|F)(?:elsius|ahrenheit)?\s*\}?")
_MIXED = re.compile(
    r"(\d+)\s*(?:\\words\{)?\s*([A-Za-z]+?)\s*(?:\}|\s|\\land|and|,)*\s*(\d+(?:\.\d+)?)\s*(?:\\words\{)?\s*([A-Za-z]+)\s*\}?"
)
"""A quantity in two units: `2 hours and 30 minutes`."""


def mixed(text: str) -> Value | None:
    """`2 hours 30 minutes`, in the smaller unit; None for anything else."""
    parts = _MIXED.fullmatch(text) if len(text) < 100 else None
    if parts is None:
        return None
    large, large_unit, small, unit = parts.groups()
    first, second = units.measure(large_unit), units.measure(unit)
    if first is None or second is None or first[0] != second[0] or first[1] <= second[1]:
        return None
    total = Fraction(large) * first[1] / second[1] + Fraction(small)
    return Value(("num", total, str(total)), unit)


def read_quantity(text: str, single: bool) -> Value | Words:
    """The value in a text with its unit, or the words when it is prose. Raises Unreadable."""
    based = _BASED.fullmatch(text)
    if based:
        return Value(parse(based[1]), f"base {based[2]}")
    text, percent = units.take_percent(text)
    text, unit = units.take_unit(text, single)
    text = text.strip()
    if not percent:
        text, percent = units.take_percent(text)
    scale, unit = units.take_scale(unit)
    if unit == "" and (thermometer := _THERMOMETER.fullmatch(text)):
        text, unit = thermometer[1], "°" + thermometer[2]
    try:
        node = parse(text)
    except Unreadable:
        words = as_words(text)
        if words is None or unit or percent:
            raise
        return Words(words)
    if node[0] == "mul" and len(text) > 2 and text.isalpha() and not unit:
        return Words(text.lower())
    if node[0] == "fn" and node[1] == "degree":
        return Value(node[2], unit or "degree", percent)
    if node[0] == "neg" and node[1][0] == "fn" and node[1][1] == "degree":
        return Value(("neg", node[1][2]), unit or "degree", percent)
    if scale != 1:
        if node[0] == "num":
            node = ("num", node[1] * scale, str(node[1] * scale))
        else:
            node = ("mul", node, ("num", Fraction(scale), str(scale)))
    return Value(node, unit, percent)


def has_sign_choice(node: Node) -> bool:
    return any(part[0] in ("pm", "mp") for part in walk(node))


def with_sign(node: Node, upper: bool) -> Node:
    """One of the two values of a plus-minus."""
    node, choice = rebuilt(node, lambda part: with_sign(part, upper)), node[0]
    if choice not in ("pm", "mp"):
        return node
    return ("add", node[1], node[2] if (choice == "pm") == upper else ("neg", node[2]))


def same_quantity(gold: Value, answer: Value, conventions: Conventions) -> bool:
    if conventions.units == "required" and units.measure(gold.unit) and not answer.unit:
        return False
    scale = units.factor(gold.unit, answer.unit)
    if scale is None:
        return False
    node = answer.node if scale == 1 else ("mul", ("num", scale, str(scale)), answer.node)
    if gold.percent or answer.percent or conventions.percent_asked:
        return _percents(gold, replace(answer, node=node), conventions)
    turn = ("fn", "pi")  # an angle that is a multiple of pi
    if {gold.unit, answer.unit} == {"degree", ""} and (turn in walk(gold.node) or turn in walk(node)):
        first, second = (("fn", "degree", each.node) if each.unit else each.node for each in (gold, answer))
        return values.same(first, second)
    if "i" in symbols(gold.node) and "j" in symbols(node) and "j" not in symbols(gold.node):
        node = _with_i(node)
    return values.same(gold.node, node, conventions.relative_tolerance)


def _with_i(node: Node) -> Node:
    """An engineer's j as the imaginary unit."""
    return ("sym", "i") if node == ("sym", "j") else rebuilt(node, _with_i)


def _percents(gold: Value, answer: Value, conventions: Conventions) -> bool:
    """A sign that one side leaves out changes nothing for numbers over 1, or where a percentage is asked for."""
    tolerance = conventions.relative_tolerance
    if gold.percent == answer.percent:
        return values.same(gold.node, answer.node, tolerance)
    hundredth: Node = ("num", Fraction(1, 100), "1/100")
    first, second = (("mul", each.node, hundredth) if each.percent else each.node for each in (gold, answer))
    if conventions.percent_asked and not gold.percent:
        return values.same(gold.node, answer.node, tolerance)
    if values.same(first, second, tolerance):
        return True
    if not values.same(gold.node, answer.node, tolerance):
        return False
    if conventions.percent_asked:
        return True
    value = values.number(gold.node) if not unknowns(gold.node) else 2
    return bool(abs(value) > 1)


def same_time(gold: Ratio, answer: Ratio) -> bool:
    """`3:45 p.m.` is `3:45` and `15:45`, not `3:45 a.m.`."""
    first, second = ([part.node for part in each.parts if isinstance(part, Value)] for each in (gold, answer))
    if len(first) != len(second) or not all(values.same(a, b) for a, b in zip(first[1:], second[1:], strict=True)):
        return False
    if gold.half and answer.half:
        return gold.half == answer.half and values.same(first[0], second[0])
    noon = ("num", Fraction(12), "12")
    hours = [
        [node, *([("add", node, noon)] if each.half == "p" else [])]
        for node, each in ((first[0], gold), (second[0], answer))
    ]
    return any(values.same(a, b) for a in hours[0] for b in hours[1])


def quotient(answer: Answer) -> Node | None:
    if isinstance(answer, Value) and not answer.percent:
        return answer.node
    if isinstance(answer, Ratio) and len(answer.parts) == 2 and not answer.time:
        top, bottom = answer.parts
        if isinstance(top, Assigned):
            top = top.value
        if isinstance(top, Value) and isinstance(bottom, Value):
            return ("div", top.node, bottom.node)
    return None
