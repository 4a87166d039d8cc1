"""Sets of real numbers: intervals, unions, inequalities and complements, compared as sets.

A set is its critical points and a membership test; between two neighbouring critical points membership does not
change. Two sets are equal when they agree at all critical points of both and once between each two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from astracli.rewards.grading import values
from astracli.rewards.grading.answer_types import (
    Answer,
    Assigned,
    Joined,
    RealLine,
    Relation,
    Several,
    Value,
    is_interval,
)
from astracli.rewards.grading.quantities import has_sign_choice, with_sign
from astracli.rewards.grading.trees import Node, complete, rebuilt, symbols, unknowns


@dataclass(frozen=True)
class RealSet:
    points: tuple[Any, ...]
    """Finite critical points, mpmath numbers."""
    contains: Callable[[Any], bool]
    variable: str = ""


def real_set(answer: Answer, pairs_are_intervals: bool = False) -> RealSet | None:
    """The set that an answer describes, None when it describes none or one with symbolic bounds.

    `pairs_are_intervals`: `(1, 2)` is read as an open interval.
    """
    try:
        return _real_set(answer, pairs_are_intervals)
    except (values.Undefined, ArithmeticError, values.context().NoConvergence):
        return None


def _real_set(answer: Answer, pairs: bool) -> RealSet | None:
    if isinstance(answer, RealLine):
        return RealSet((), lambda x: True) if answer.letter == "R" else None
    if isinstance(answer, Several):
        if is_interval(answer) or (pairs and answer.brackets == "()" and len(answer.items) == 2):
            return _interval(answer)
        return _points(answer) if answer.brackets == "{}" else None
    if isinstance(answer, Relation):
        return _inequality(answer)
    if isinstance(answer, Assigned):
        return _points(Several((answer.value,), "{}"), answer.name)
    if isinstance(answer, Joined):
        return _joined(answer)
    return None


def _joined(answer: Joined) -> RealSet | None:
    found = complete(_real_set(part, True) for part in answer.parts)
    if found is None:
        return None
    points = tuple(point for part in found for point in part.points)
    names = {part.variable for part in found if part.variable}
    if len(names) > 1:
        return None
    name = names.pop() if names else ""
    if answer.how == "minus":
        first, *others = found
        return RealSet(points, lambda x: first.contains(x) and not any(o.contains(x) for o in others), name)
    both = RealSet(points, lambda x: all(part.contains(x) for part in found), name)
    either = RealSet(points, lambda x: any(part.contains(x) for part in found), name)
    if answer.how == "either":
        return both if any(both.contains(x) for x in _probes(points)) else either
    return either if answer.how == "or" else both


def _bound(answer: Answer) -> Any:
    if isinstance(answer, Assigned):
        answer = answer.value
    if not isinstance(answer, Value) or unknowns(answer.node):
        raise values.Undefined("a symbolic bound")
    value = values.number(answer.node)
    mp = values.context()
    if mp.im(value) != 0:
        raise values.Undefined("no real bound")
    return mp.re(value)


def _interval(answer: Several) -> RealSet:
    low, high = (_bound(item) for item in answer.items)
    closed_low, closed_high = answer.brackets[0] == "[", answer.brackets[1] == "]"
    if low > high:
        raise values.Undefined("the bounds are in the wrong order")

    def contains(x: Any) -> bool:
        above = (x > low and not _equal(x, low)) or (closed_low and _equal(x, low))
        return bool(above and ((x < high and not _equal(x, high)) or (closed_high and _equal(x, high))))

    mp = values.context()
    return RealSet(tuple(point for point in (low, high) if mp.isfinite(point)), contains)


def _points(answer: Several, variable: str = "") -> RealSet:
    points = tuple(_bound(item) for item in answer.items)
    return RealSet(points, lambda x: any(_equal(x, point) for point in points), variable)


def _equal(a: Any, b: Any) -> bool:
    return values.close(a, b, 30)


def _inequality(relation: Relation) -> RealSet | None:
    if any(has_sign_choice(side) for side in relation.sides):
        both = [replace(relation, sides=tuple(with_sign(s, upper) for s in relation.sides)) for upper in (True, False)]
        return _joined(Joined("and" if relation.operators == ("!=",) else "or", tuple(both)))
    sides = [_without_calls(side) for side in relation.sides]
    names = set().union(*map(unknowns, sides))
    if len(names) != 1:
        return None
    (name,) = names
    links = list(zip(sides, relation.operators, sides[1:], strict=False))
    found = complete(_link(left, operator, right, name) for left, operator, right in links)
    if found is None:
        return None
    return RealSet(
        tuple(point for part in found for point in part.points), lambda x: all(part.contains(x) for part in found), name
    )


def _without_calls(node: Node) -> Node:
    """`f(x)` as one variable."""
    if node[0] == "call":
        return ("sym", f"{node[1]}({node[2]})")
    return rebuilt(node, _without_calls)


def _link(left: Node, operator: str, right: Node, name: str) -> RealSet | None:
    """One inequality: its zeros are the critical points."""
    mp = values.context()
    if any(_infinite(side) for side in (left, right)):
        return RealSet((), lambda x: operator in ("<", ">"))
    difference: Node = ("add", left, ("neg", right))
    if not symbols(difference):
        return None
    roots = _zeros(left, right, name)
    if roots is None:
        return None

    def contains(x: Any) -> bool:
        at_root = any(_equal(x, root) for root in roots)
        if at_root:
            return operator in ("<=", ">=", "=")
        if operator in ("=", "!="):
            return operator == "!="
        value = mp.re(values.number(difference, {name: x}))
        return bool(value < 0 if operator in ("<", "<=") else value > 0)

    return RealSet(tuple(roots), contains, name)


def _infinite(node: Node) -> bool:
    return node == ("fn", "infty") or (node[0] == "neg" and _infinite(node[1]))


def _zeros(left: Node, right: Node, name: str) -> list[Any] | None:
    """Real zeros of left - right: of a polynomial of degree up to 6, or of an absolute value against a number."""
    for inner, other in ((left, right), (right, left)):
        if inner[0] == "fn" and inner[1] == "abs" and name not in symbols(other):
            first = _polynomial_zeros(("add", inner[2], ("neg", other)), name)
            second = _polynomial_zeros(("add", inner[2], other), name)
            return None if first is None or second is None else first + second
    return _polynomial_zeros(("add", left, ("neg", right)), name)


def _polynomial_zeros(node: Node, name: str) -> list[Any] | None:
    mp = values.context()
    table = [(x, mp.re(values.number(node, {name: x}))) for x in map(mp.mpf, range(-4, 4))]
    coefficients = _divided_differences(table)
    scale = max(abs(c) for c in coefficients)
    degree = max((k for k, c in enumerate(coefficients) if abs(c) > scale * mp.mpf(10) ** -40), default=0)
    if degree > 6:
        return None
    if degree == 0:
        return []
    matrix = mp.matrix([[x**power for power in range(degree, -1, -1)] for x, _ in table[: degree + 1]])
    solved = mp.lu_solve(matrix, mp.matrix([value for _, value in table[: degree + 1]]))
    roots = mp.polyroots(list(solved), maxsteps=200, extraprec=300)
    return [mp.re(root) for root in roots if abs(mp.im(root)) <= mp.mpf(10) ** -25 * (1 + abs(root))]


def _divided_differences(table: list[tuple[Any, Any]]) -> list[Any]:
    column = [value for _, value in table]
    found = [column[0]]
    for order in range(1, len(table)):
        column = [(column[i + 1] - column[i]) / (table[i + order][0] - table[i][0]) for i in range(len(table) - order)]
        found.append(column[0])
    return found


def _probes(points: tuple[Any, ...]) -> list[Any]:
    """All critical points, one point between each two neighbours, and one beyond each end."""
    mp = values.context()
    ordered: list[Any] = []
    for point in sorted(points):
        if not ordered or not _equal(point, ordered[-1]):
            ordered.append(point)
    if not ordered:
        return [mp.mpf(0)]
    between = [(a + b) / 2 for a, b in pairwise(ordered)]
    return [ordered[0] - 1, *ordered, *between, ordered[-1] + 1]


def equal_sets(a: RealSet, b: RealSet) -> bool:
    if a.variable and b.variable and a.variable != b.variable:
        return False
    return all(a.contains(x) == b.contains(x) for x in _probes(a.points + b.points))
