"""The types of an answer: a value, several values, an equation, an inequality, a set of reals, a ratio, words."""

from __future__ import annotations

from dataclasses import dataclass

from astracli.rewards.grading.trees import Node, unknowns


@dataclass(frozen=True)
class Value:
    node: Node
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Several:
    """Values side by side. `brackets` is what stands around them: nothing, or the two characters."""

    items: tuple[Answer, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Joined:
    """Sets or conditions joined by `or`, `and`, `minus`."""

    how: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Assigned:
    """`x = 5`, `f(x) = 2x`: a name and its value."""

    name: str
    value: Answer
    left: Node | None = None


@dataclass(frozen=True)
class Relation:
    """A chain of sides with `=`, `<`, `<=`, `>`, `>=` or `!=` between them."""

    sides: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    parts: tuple[Answer, ...]
    time: bool = False
    half: str = ""
    """`a` or `p` for a time in the morning or the afternoon; empty where it is not said."""


@dataclass(frozen=True)
class RealLine:
    """All real numbers; `letter` for the others: Z, Q, N, C."""

    letter: str = "R"


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Dots:
    """The ellipsis of a list."""


Answer = Value | Several | Joined | Assigned | Relation | Ratio | RealLine | Words | Dots


def is_interval(answer: Answer) -> bool:
    """Whether the brackets say interval: one round and one square, or two square ones around two values."""
    return (
        isinstance(answer, Several)
        and len(answer.items) == 2
        and answer.brackets in ("[)", "(]", "[]", "][", "]]", "[[")
    )


def variables(answer: Answer) -> set[str]:
    """Names of the variables in an answer, without the imaginary unit and Euler's number."""
    if isinstance(answer, Value):
        return unknowns(answer.node)
    if isinstance(answer, (Several, Joined, Ratio)):
        return set().union(*map(variables, answer.items if isinstance(answer, Several) else answer.parts))
    if isinstance(answer, Assigned):
        return variables(answer.value)
    if isinstance(answer, Relation):
        return set().union(*map(unknowns, answer.sides))
    return set()
