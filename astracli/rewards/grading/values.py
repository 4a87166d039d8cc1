"""Are two expressions the same number or the same function? Exact fractions where possible, else 60 digits.

Identity of functions is tested at points: the variables get fixed pseudo-random values, and two expressions that agree
at all of them in 40 digits are the same. No symbolic simplification, so nothing takes for ever; powers and factorials
that would are refused (`Undefined`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any

from astracli.rewards.grading.exact import Undefined, exact
from astracli.rewards.grading.trees import Node, symbols, unknowns, walk

DIGITS = 60
_AGREE = 40
LEAST_DIGITS = 6
"""Digits behind the point, all significant, from which on a decimal may stand for the exact value that it rounds."""
_POINTS = 4
_INTEGER_NAMES = frozenset("ijklmnNMKpqrst")
_MPMATH_NAMES = {"sgn": "sign", "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh"}
_MPMATH_NAMES |= {"arccot": "acot", "arcsec": "asec", "arccsc": "acsc"}
_DISCRETE = frozenset(("floor", "ceil", "factorial", "binom", "gcd", "lcm"))


@lru_cache(maxsize=1)
def context() -> Any:
    """mpmath with `DIGITS` digits, apart from the settings of others."""
    from mpmath import mp

    own = mp.clone()
    own.dps = DIGITS
    return own


def number(node: Node, point: Mapping[str, Any] | None = None) -> Any:
    """The value at a point as an mpmath number. Raises Undefined."""
    mp = context()
    try:
        value = _number(node, point or {}, mp)
        if mp.isnan(value):
            raise Undefined("no number")
        return value
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Undefined(str(error)) from None


def _number(node: Node, point: Mapping[str, Any], mp: Any) -> Any:
    kind = node[0]
    if kind == "num":
        return mp.mpf(node[1].numerator) / node[1].denominator
    if kind == "sym":
        if node[1] in point:
            return point[node[1]]
        if node[1] not in ("e", "i"):
            raise Undefined(f"`{node[1]}` has no value")
        return mp.e + 0 if node[1] == "e" else mp.mpc(0, 1)
    if kind == "call":
        inner = _number(node[2], point, mp)
        seed = f"{node[1]}({mp.nstr(inner, 20)})"
        return mp.mpf(random.Random(seed).uniform(0.4, 2.6))
    if kind == "fn":
        return _function(node, point, mp)
    values = [_number(part, point, mp) for part in node[1:]]
    if kind == "add":
        return sum(values[1:], values[0])
    if kind == "mul":
        return math.prod(values[1:], start=values[0])
    if kind == "neg":
        return -values[0]
    if kind == "div":
        return values[0] / values[1]
    if kind == "pow":
        return _power(values[0], values[1], mp)
    raise Undefined(f"a {kind} has two values")


def _power(base: Any, exponent: Any, mp: Any) -> Any:
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined("zero to a power that is not positive")
        return mp.mpf(0)
    if not mp.isfinite(base) or not mp.isfinite(exponent):
        raise Undefined("a power of infinity")
    if abs(mp.re(exponent * mp.log(base))) > 1e7:
        raise Undefined("the power is too large")
    return mp.power(base, exponent)


def _function(node: Node, point: Mapping[str, Any], mp: Any) -> Any:
    name = node[1]
    if name == "pi":
        return mp.pi + 0
    if name == "infty":
        return mp.inf
    values = [_number(argument, point, mp) for argument in node[2:]]
    x = values[0]
    if name == "degree":
        return x * mp.pi / 180
    if name == "root":
        degree = values[1]
        if mp.im(x) == 0 and mp.re(x) < 0 and mp.isint(degree) and int(degree) % 2:
            return -mp.power(-x, 1 / degree)
        return _power(x, 1 / degree, mp)
    if name in ("ln", "log", "lg"):
        if x == 0:
            raise Undefined("the logarithm of zero")
        base = values[1] if len(values) > 1 else mp.mpf(10) if name == "lg" else mp.e
        return mp.log(x) / mp.log(base)
    if name in ("exp", "sinh", "cosh", "sin", "cos", "tan") and abs(x) > 1e7:
        raise Undefined("the argument is too large")
    if name in ("factorial", "binom"):
        if max(abs(value) for value in values) > 1e6:
            raise Undefined("the factorial is too large")
        return mp.factorial(x) if name == "factorial" else mp.binomial(*values[:2])
    if name == "abs":
        return abs(x)
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    function = getattr(mp, _MPMATH_NAMES.get(name, str(name)), None)
    if function is None or name in ("det", "gcd", "lcm"):
        raise Undefined(f"`{name}` is not worked out")
    return function(x)


def close(a: Any, b: Any, digits: int = _AGREE) -> bool:
    """Whether two mpmath numbers agree in relative terms."""
    mp = context()
    if mp.isinf(a) or mp.isinf(b):
        return bool(a == b)
    size = max(abs(a), abs(b))
    return bool(size == 0 or abs(a - b) <= size * mp.mpf(10) ** -digits)


def points(names: set[str], nodes: tuple[Node, Node]) -> Iterator[dict[str, Any]]:
    """Where two expressions are compared: positive values; negative ones too where no root or logarithm forbids it."""
    draw = random.Random("points of comparison")
    ranges = [(0.6, 3.1)]
    if any(_is_discrete(node) for node in nodes):
        ranges.append((4.0, 40.0))
    if not any(_rooted(node) for node in nodes):
        ranges.append((-3.1, -0.6))
    for low, high in ranges:
        for _ in range(_POINTS):
            yield {name: context().mpf(draw.uniform(low, high)) for name in sorted(names)}


def _integer_points(names: set[str]) -> Iterator[dict[str, Any]]:
    draw = random.Random("integers of comparison")
    for i in range(12):
        yield {name: context().mpf(draw.randint(1, 9) + i) for name in sorted(names)}


def _rooted(node: Node) -> bool:
    if node[0] == "fn" and node[1] in ("sqrt", "root", "ln", "log", "lg"):
        return bool(symbols(node))
    if node[0] == "pow" and (symbols(node[2]) or (power := exact(node[2])) is None or power.denominator != 1):
        return True
    return any(_rooted(part) for part in node[1:] if isinstance(part, tuple))


def _is_discrete(node: Node) -> bool:
    return any(part[0] == "fn" and part[1] in _DISCRETE for part in walk(node))


def same(a: Node, b: Node, tolerance: float = 0.0) -> bool:
    """Whether two expressions have the same value, for all values of their variables. Raises Undefined."""
    if a == b:
        return True
    left, right = _exact_or_none(a), _exact_or_none(b)
    if left is not None and right is not None:
        if left == right:
            return True
        if tolerance > 0 and abs(left - right) <= tolerance * abs(left):
            return True
        if max(decimal_digits(a), decimal_digits(b)) < LEAST_DIGITS or min(decimal_digits(a), decimal_digits(b)) > 0:
            return False
    names = {name for name in unknowns(a) | unknowns(b) if not name.endswith("()")}
    if not names:
        x, y = number(a), number(b)
        return close(x, y) or rounded(a, y) or rounded(b, x) or (tolerance > 0 and abs(x - y) <= tolerance * abs(x))
    return _same_function(a, b, names)


def _exact_or_none(node: Node) -> Fraction | None:
    try:
        return exact(node)
    except Undefined:
        return None


def _same_function(a: Node, b: Node, names: set[str]) -> bool:
    if _agree(a, b, points(names, (a, b)), 3):
        return True
    if names <= _INTEGER_NAMES and (_is_discrete(a) or _is_discrete(b) or _alternates(a, b)):
        return _agree(a, b, _integer_points(names), 6)
    return False


def _alternates(a: Node, b: Node) -> bool:
    """A power of a negative number, or a sine or cosine of a multiple of pi: meant for integers."""
    return any("('neg', ('num'" in repr(node) or "'cos'" in repr(node) or "'sin'" in repr(node) for node in (a, b))


def at_points(a: Node, b: Node, points: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """The values of two expressions at the points where both have one."""
    for point in points:
        with suppress(Undefined):
            yield number(a, point), number(b, point)


def _agree(a: Node, b: Node, points: Iterable[dict[str, Any]], least: int) -> bool:
    """Whether the values agree at all points where both have one, there are enough of those, and not all are zero."""
    compared, nonzero = 0, 0 in (_exact_or_none(a), _exact_or_none(b))
    for x, y in at_points(a, b, points):
        compared += 1
        if not close(x, y):
            return False
        nonzero = nonzero or x != 0
    return compared >= least and nonzero


def decimal_digits(node: Node) -> int:
    """Significant digits of a decimal with at least `LEAST_DIGITS` behind the point, 0 for anything else."""
    while node[0] == "neg":
        node = node[1]
    if node[0] != "num" or "." not in node[2]:
        return 0
    if len(node[2].partition(".")[2].lower().partition("e")[0]) < LEAST_DIGITS:
        return 0
    return len(node[2].lower().partition("e")[0].replace(".", "").lstrip("0"))


def rounded(node: Node, value: Any) -> bool:
    """Whether `node` is a decimal with so many digits that it stands for `value`, rounded to them or to 10."""
    digits = min(decimal_digits(node), 10)
    mp = context()
    if digits < LEAST_DIGITS or mp.im(value) != 0 or not mp.isfinite(value):
        return False
    written = number(node)
    unit = mp.mpf(10) ** (mp.floor(mp.log10(abs(written))) - digits + 1)
    return bool(abs(written - mp.re(value)) <= unit * mp.mpf("0.5000001"))
