"""The tools that ship with astra. Each call runs in a process of its own, in an empty folder, under limits."""

from __future__ import annotations

import ast
import operator
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-", ",": ""})
_LARGEST_POWER = 10_000
"""Bits of a power's result, about."""


def calculator(expression: str) -> str:
    """Computes an arithmetic expression and returns its value.

    Args:
        expression: numbers, parentheses and + - * / // % **
    """
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"`{expression}` is no arithmetic expression") from None
    value = _value(tree.body)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * max(1, int(abs(left)).bit_length()) > _LARGEST_POWER:
            raise ValueError("the result would be too large")
        found: int | float = _BINARY[type(node.op)](left, right)
        return found
    raise ValueError(f"`{ast.unparse(node)}` is no number and no operation of + - * / // % **")


def python(code: str) -> str:
    """Runs a Python program and returns what it prints, and the value of its last line when that is an expression.

    Args:
        code: the program; nothing is kept from one call to the next
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        try:
            _execute(code)
        except SystemExit as end:
            if end.code not in (None, 0):
                print(f"exit code {end.code}")
        except BaseException as error:
            _show(error, code)
        sys.stdout.flush()
        sys.stderr.flush()
        output.seek(0)
        return output.read().decode("utf-8", "replace")


python.fresh = True  # type: ignore[attr-defined]


def _execute(code: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    tree = ast.parse(code, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
        if value is not None:
            print(value if isinstance(value, str) else repr(value))


def _show(error: BaseException, code: str) -> None:
    """The traceback, without lines that are not the program's."""
    sys.stdout.flush()
    lines = code.splitlines()
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == "<code>" and frame.lineno:
            source = lines[frame.lineno - 1].strip() if frame.lineno <= len(lines) else ""
            print(f"line {frame.lineno}: {source}", file=sys.stderr)
    print("".join(traceback.format_exception_only(error)).strip(), file=sys.stderr)
