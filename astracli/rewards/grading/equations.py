"""Equations and inequalities with variables: the same up to a factor, or to the order of reading."""

from __future__ import annotations

from typing import Any

from astracli.rewards.grading import values
from astracli.rewards.grading.answer_types import Answer, Assigned, Relation, Value
from astracli.rewards.grading.trees import Node, unknowns


def _difference(answer: Answer) -> Node | None:
    """Left side minus right side of one equation."""
    if isinstance(answer, Relation) and answer.operators == ("=",):
        return ("add", answer.sides[0], ("neg", answer.sides[1]))
    if isinstance(answer, Assigned) and answer.left is not None and isinstance(answer.value, Value):
        return ("add", answer.left, ("neg", answer.value.node))
    return None


def same_equation(gold: Answer, answer: Answer) -> bool:
    """Whether two equations are the same up to a constant factor: their quotient is the same everywhere."""
    first, second = _difference(gold), _difference(answer)
    if first is None or second is None or unknowns(first) != unknowns(second):
        return False
    names = {name for name in unknowns(first) if not name.endswith("()")}
    if not names:
        return False
    quotient: Any = None
    compared = 0
    points = values.points(names, (first, second))
    for a, b in values.at_points(first, second, points):
        compared += 1
        if a == 0 or b == 0 or (quotient is not None and not values.close(a / b, quotient)):
            return False
        quotient = a / b
    return compared >= 3


def same_chain(gold: Relation, answer: Relation) -> bool:
    """Chains of inequalities with symbols: the same sides in the same order, or all turned round."""
    turned = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
    backwards = tuple(turned[operator] for operator in reversed(answer.operators))
    for sides, operators in ((answer.sides, answer.operators), (answer.sides[::-1], backwards)):
        if operators == gold.operators and all(values.same(a, b) for a, b in zip(gold.sides, sides, strict=True)):
            return True
    return False
