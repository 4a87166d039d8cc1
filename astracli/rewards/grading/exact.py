"""Expressions of rational numbers, worked out exactly."""

from __future__ import annotations

import math
from fractions import Fraction

from astracli.rewards.grading.trees import Node, complete

MAX_BITS = 2_000_000
"""Largest integer, in bits, that is worked out."""


class Undefined(ValueError):
    """An expression has no value here, or one that is too large to work out."""


def exact(node: Node) -> Fraction | None:
    """The value of an expression of rational numbers, None for any other."""
    kind = node[0]
    if kind == "num":
        return Fraction(node[1])
    if kind in ("sym", "call", "pm", "mp"):
        return None
    if kind == "fn":
        return _exact_function(node)
    found = complete(exact(part) for part in node[1:])
    if found is None:
        return None
    if kind == "add":
        return sum(found, Fraction(0))
    if kind == "mul":
        product = Fraction(1)
        for value in found:
            product = _bounded(product * value)
        return product
    if kind == "neg":
        return -found[0]
    if kind == "div":
        if found[1] == 0:
            raise Undefined("division by zero")
        return found[0] / found[1]
    return _exact_power(found[0], found[1])


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent <= 0:
        raise Undefined("zero to a power that is not positive")
    size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if base in (0, 1, -1):
        return base**2 if exponent % 2 == 0 and exponent else (base if exponent else Fraction(1))
    if size * abs(exponent) > MAX_BITS:
        raise Undefined("the power is too large")
    return base ** int(exponent)


def _exact_function(node: Node) -> Fraction | None:
    name, arguments = node[1], node[2:]
    if name not in ("factorial", "binom", "abs", "floor", "ceil", "gcd", "lcm", "max", "min"):
        return None
    values = complete(exact(argument) for argument in arguments)
    if not values:
        return None
    if name == "abs":
        return abs(values[0])
    if name == "floor":
        return Fraction(values[0].numerator // values[0].denominator)
    if name == "ceil":
        return Fraction(-(-values[0].numerator // values[0].denominator))
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(value.denominator != 1 or value < 0 for value in values):
        return None
    whole = [int(value) for value in values]
    if name in ("gcd", "lcm"):
        return Fraction(getattr(math, name)(*whole))
    if max(whole) > 20_000:
        raise Undefined("the factorial is too large")
    return Fraction(math.factorial(whole[0]) if name == "factorial" else math.comb(*whole[:2]))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise Undefined("the number is too large")
    return value
