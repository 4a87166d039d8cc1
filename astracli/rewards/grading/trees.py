"""Expressions as trees, and what can be read off one.

A tree is a tuple: ("num", Fraction, text), ("sym", name), ("call", name, argument), ("add", a, b, ...),
("mul", a, b, ...), ("neg", a), ("div", a, b), ("pow", a, b), ("fn", name, argument, ...), ("pm", a, b), ("mp", a, b).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Node = tuple[Any, ...]
T = TypeVar("T")


class Unreadable(ValueError):
    """The text is no expression that this parser knows."""


class TooLarge(Unreadable):
    """The text is longer, or nested more deeply, than any answer is."""


def symbols(node: Node) -> set[str]:
    """Names of the variables in a tree; a call counts as one, `f(x)`."""
    if node[0] == "sym":
        return {node[1]}
    if node[0] == "num":
        return set()
    found = {f"{node[1]}()"} if node[0] == "call" else set()
    for part in node[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


def complete(parts: Iterable[T | None]) -> list[T] | None:
    """The parts; None when one of them is."""
    found = list(parts)
    return None if None in found else [part for part in found if part is not None]


def unknowns(node: Node) -> set[str]:
    """`symbols` without the imaginary unit and Euler's number."""
    return symbols(node) - {"e", "i"}


def walk(node: Node) -> Iterator[Node]:
    """A tree and all trees inside it."""
    yield node
    for part in node[1:]:
        if isinstance(part, tuple):
            yield from walk(part)


def rebuilt(node: Node, change: Callable[[Node], Node]) -> Node:
    """The node with every tree directly inside it changed."""
    return (node[0], *(change(part) if isinstance(part, tuple) else part for part in node[1:]))


def canonical(node: Node) -> Node:
    """The tree with sums and products flat and sorted: the same for expressions that differ in spelling only."""
    if node[0] in ("num", "sym"):
        return node[:2]
    parts = [canonical(part) if isinstance(part, tuple) else part for part in node[1:]]
    if node[0] in ("add", "mul"):
        flat: list[Any] = []
        for part in parts:
            flat.extend(part[1:] if part[0] == node[0] else [part])
        return (node[0], *sorted(flat, key=repr))
    if node[0] == "neg" and parts[0][0] == "num":
        return ("num", -parts[0][1])
    return (node[0], *parts)
