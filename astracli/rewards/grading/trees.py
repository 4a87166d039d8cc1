"""Expressions as trees, and what can be read off one.

A tree is a tuple: ("num", Fraction, text), ("sym", name), ("call", name, argument), ("add", a, b, ...),
("mul", a, b, ...), ("neg", a), ("div", a, b), ("pow", a, b), ("fn", name, argument, ...), ("pm", a, b), ("mp", a, b).
"""

from __future__ import annotations

from typing import Any

Node = tuple[Any, ...]


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
