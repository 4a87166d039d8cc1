"""Generated problems of several steps, `(37+48)*6-15`: every step is written out, column by column, then the answer.

The solution of `(37+48)*6` is `37+48 15 08=85 85*6 30 51=510 \\boxed{510}`. Columns are `arithmetic.worked`'s, lowest
digit first with the carry; a column of a product is digit x factor + carry. Operations run from left to right
(parentheses stand where precedence would say otherwise); no intermediate result is under 0 or over 999. A tenth of all
expressions, by a hash of the text, is only ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import xxhash

StepLevel = Literal["steps2", "steps3", "steps4"]
STEP_LEVELS: tuple[StepLevel, ...] = ("steps2", "steps3", "steps4")
"""By their number of operations."""

LARGEST = 999
_PARTS = re.compile(r"(\d+)|([+*-])", re.ASCII)
_WHOLE = re.compile(r"\(*\d+(?:[+*-]\d+\)*)+", re.ASCII)


def is_held_out(question: str) -> bool:
    return xxhash.xxh64_intdigest(f"steps:{question}".encode()) % 10 == 0


def expression(operations: int, bits: Callable[[int], int]) -> tuple[str, int]:
    """(text, value) of an expression. `bits(n)`: the n-th 64 random bits; 2 x `operations` + 1 are used."""
    value = 10 + bits(0) % 90
    text, last = str(value), ""
    for number in range(operations):
        possible = [
            op
            for op, fits in (("+", value + 99 <= LARGEST), ("-", value >= 10), ("*", 0 < 2 * value <= LARGEST))
            if fits
        ]
        op = possible[bits(2 * number + 1) % len(possible)]
        low, high = {"+": (10, 99), "-": (10, min(99, value)), "*": (2, min(9, LARGEST // max(1, value)))}[op]
        operand = low + bits(2 * number + 2) % (high - low + 1)
        text, last, value = _extended(text, last, op, operand), op, apply(op, value, operand)
    return text, value


def _extended(text: str, last: str, op: str, operand: int) -> str:
    """An expression with one operation more; `last` is its outermost one. A product of a sum gets brackets."""
    return f"({text}){op}{operand}" if op == "*" and last in ("+", "-") else f"{text}{op}{operand}"


def apply(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def columns(op: str, a: int, b: int) -> str:
    """`15 08` of 37+48: a column's sum, difference + 10 or product, with the carry. Needs a >= b for `-`."""
    carry, written = 0, []
    for place in range(len(str(a if op == "*" else max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        column = {"+": x + y + carry, "-": x - y - carry + 10, "*": x * b + carry}[op]
        carry = column // 10 if op != "-" else int(column < 10)
        written.append(f"{column:02d}")
    return " ".join(written)


def worked_text(question: str) -> str:
    """The written-out solution of a problem text. Raises ValueError for any other text.

    It goes from left to right, so a text whose brackets do not say so (`2+3*4`) is none of this family, and neither is
    one that its columns cannot write: a product with more than a digit, a difference below zero.
    """
    other = ValueError(f"`{question}` is no problem of this family")
    if not _WHOLE.fullmatch(question):
        raise other
    parts = [number or op for number, op in _PARTS.findall(question)]
    value, steps = int(parts[0]), []
    text, last = str(value), ""
    for op, operand in zip(parts[1::2], map(int, parts[2::2]), strict=True):
        result = apply(op, value, operand)
        if result < 0 or (op == "*" and operand > 9):
            raise other
        steps.append(f"{value}{op}{operand} {columns(op, value, operand)}={result}")
        text, last, value = _extended(text, last, op, operand), op, result
    if text != question:
        raise other
    return f"{' '.join(steps)} \\boxed{{{value}}}"
