"""Numbers and expressions with what stands around them: units, percent signs, degrees, plus-minus."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from astracli.rewards.grading import units, values
from astracli.rewards.grading.answer_types import Value
from astracli.rewards.grading.conventions import Conventions
from astracli.rewards.grading.trees import Node, rebuilt, symbols, unknowns, walk


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
