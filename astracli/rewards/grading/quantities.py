"""Numbers and expressions with what stands around them: units, percent signs, degrees, plus-minus."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from astracli.rewards.grading import units, values
from astracli.rewards.grading.answer_types import Value
from astracli.rewards.grading.conventions import Conventions
from astracli.rewards.grading.trees import Node, symbols


def has_sign_choice(node: Node) -> bool:
    return node[0] in ("pm", "mp") or any(has_sign_choice(part) for part in node[1:] if isinstance(part, tuple))


def with_sign(node: Node, upper: bool) -> Node:
    if node[0] in ("num", "sym"):
        return node
    parts = tuple(with_sign(part, upper) if isinstance(part, tuple) else part for part in node[1:])
    if node[0] in ("pm", "mp"):
        plus = (node[0] == "pm") == upper
        return ("add", parts[0], parts[1] if plus else ("neg", parts[1]))
    return (node[0], *parts)


def same_quantity(gold: Value, answer: Value, conventions: Conventions) -> bool:
    if conventions.units_required and units.measure(gold.unit) and not answer.unit:
        return False
    scale = units.factor(gold.unit, answer.unit)
    if scale is None:
        return False
    node = answer.node if scale == 1 else ("mul", ("num", scale, str(scale)), answer.node)
    if gold.percent or answer.percent or conventions.percent_asked:
        return _percents(gold, replace(answer, node=node), conventions)
    if {gold.unit, answer.unit} == {"degree", ""} and (_turns(gold.node) or _turns(node)):
        first, second = (("fn", "degree", each.node) if each.unit else each.node for each in (gold, answer))
        return values.same(first, second)
    gold_node, node = _one_unit(gold.node, node)
    return values.same(gold_node, node, conventions.tolerance)


def _turns(node: Node) -> bool:
    """Whether an angle is a multiple of pi."""
    return node == ("fn", "pi") or any(_turns(part) for part in node[1:] if isinstance(part, tuple))


def _one_unit(gold: Node, answer: Node) -> tuple[Node, Node]:
    """An engineer's j is the imaginary unit where the gold has i and no j."""
    if "i" in symbols(gold) and "j" in symbols(answer) and "j" not in symbols(gold):
        return gold, _renamed(answer)
    return gold, answer


def _renamed(node: Node) -> Node:
    if node == ("sym", "j"):
        return ("sym", "i")
    return (
        (node[0], *(_renamed(part) if isinstance(part, tuple) else part for part in node[1:]))
        if node[0] != "num"
        else node
    )


def _percents(gold: Value, answer: Value, conventions: Conventions) -> bool:
    """A sign that one side leaves out changes nothing for numbers over 1, or where a percentage is asked for."""
    tolerance = conventions.tolerance
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
    value = values.number(gold.node) if not symbols(gold.node) - {"e", "i"} else 2
    return bool(abs(value) > 1)
