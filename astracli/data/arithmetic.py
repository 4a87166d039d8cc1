"""The generated task: seeded addition and subtraction of graded difficulty, with held-out operand pairs.

A problem reads `37+45`. Its worked solution writes every column's sum, lowest digit first and with the carry, then the
answer: `12 08 \\boxed{82}`. A subtraction column is a - b - borrow + 10, so that it never goes below zero.

Problems of several steps are `arithmetic_steps`'s; `draw` knows their levels too. Products (`mul2`, `mul3`) have no
worked solution: they are for a calculator.

Every draw is a pure function of (seed, index): there is no running state, and any draw can be repeated alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any, Literal

import xxhash

from astracli.data import arithmetic_steps
from astracli.data.arithmetic_steps import STEP_LEVELS
from astracli.data.prompts import Problem

Level = Literal["add2", "sub2", "add3", "sub3"]
LEVELS: tuple[Level, ...] = ("add2", "sub2", "add3", "sub3")

PRODUCTS = ("mul2", "mul3")
_SHAPE = {"add2": ("+", 2), "sub2": ("-", 2), "add3": ("+", 3), "sub3": ("-", 3), "mul2": ("*", 2), "mul3": ("*", 3)}
_HELD_OUT_SEED = 1234
_QUESTION = re.compile(r"(\d+)([+-])(\d+)", re.ASCII)


def is_held_out(op: str, a: int, b: int) -> bool:
    """Whether an operand pair belongs to the tenth that is only ever evaluated. `a+b` and `b+a` are one pair."""
    if op != "-" and a < b:
        a, b = b, a
    return xxhash.xxh64_intdigest(f"{op}:{a}:{b}".encode()) % 10 == 0


def draw(index: int, seed: int, levels: Sequence[str] = LEVELS) -> Problem:
    """Training problem number `index` (0, 1, 2, ...) of a seed: levels uniformly, never a held-out pair."""
    level = levels[_bits(seed, index, 0) % len(levels)]
    return _draw(level, seed, index, held_out=False)


def held_out(n: int = 256, levels: Sequence[str] = LEVELS) -> list[Problem]:
    """The evaluation items: always the same, distinct pairs, the levels in turns. Raises ValueError for n > 1200."""
    if not 0 < n <= 1200:
        raise ValueError(f"{n} held-out items asked for, 1 to 1200 are there")
    items: dict[Any, Problem] = {}
    index = 0
    while len(items) < n:
        problem = _draw(levels[len(items) % len(levels)], _HELD_OUT_SEED, index, held_out=True)
        meta = problem.meta
        same = (meta["op"], *sorted((meta["a"], meta["b"]))) if "op" in meta else problem.id
        items.setdefault(same, problem)
        index += 1
    return list(items.values())


def worked(op: str, a: int, b: int) -> str:
    """The written-out solution: the columns, lowest digit first, then the boxed answer. Needs a >= b for `-`."""
    return f"{arithmetic_steps.columns(op, a, b)} \\boxed{{{arithmetic_steps.apply(op, a, b)}}}"


def worked_text(question: str) -> str:
    """The solution of a problem text: `37+45` -> `12 08 \\boxed{82}`. Raises ValueError for any other text."""
    match = _QUESTION.fullmatch(question)
    if match is None or (match[2] == "-" and int(match[1]) < int(match[3])):
        return arithmetic_steps.worked_text(question)
    return worked(match[2], int(match[1]), int(match[3]))


def _draw(level: str, seed: int, index: int, *, held_out: bool) -> Problem:
    if level in STEP_LEVELS:
        return _draw_steps(level, seed, index, held_out=held_out)
    op, digits = _SHAPE[level]
    low, span = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    attempt = 0
    while True:
        a = low + _bits(seed, index, 2 * attempt + 1) % span
        b = low + _bits(seed, index, 2 * attempt + 2) % span
        attempt += 1
        if op == "-" and a < b:
            a, b = b, a
        if is_held_out(op, a, b) == held_out:
            break
    question = f"{a}{op}{b}"
    meta = {"level": level, "op": op, "a": a, "b": b}
    return Problem(id=f"{level}:{question}", question=question, answer=str(arithmetic_steps.apply(op, a, b)), meta=meta)


def _draw_steps(level: str, seed: int, index: int, *, held_out: bool) -> Problem:
    operations, attempt = int(level[-1]), 0
    while True:

        def bits(n: int, first: int = attempt * 64) -> int:
            return _bits(seed, index, first + n + 1)

        question, value = arithmetic_steps.expression(operations, bits)
        attempt += 1
        if arithmetic_steps.is_held_out(question) == held_out:
            return Problem(id=f"{level}:{question}", question=question, answer=str(value), meta={"level": level})


def _bits(seed: int, index: int, counter: int) -> int:
    """64 random bits of one place in the sequence."""
    return xxhash.xxh64_intdigest(struct.pack("<QQQ", seed, index, counter))
