"""The tokens of an expression in LaTeX or plain notation: letters that spell a function or a constant are one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from astracli.rewards.grading.characters import GREEK_NAMES
from astracli.rewards.grading.trees import Node, Unreadable

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![A-Za-z\d]))?)|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<power>\*\*)|(?P<word>[A-Za-z]+)|(?P<other>.)",
    re.DOTALL | re.ASCII,
)
_SYMBOLS = ("ell", "hbar", "partial", "infty", "prime", "circ", "star", "angle", "triangle", "odot")
GREEK = GREEK_NAMES | {"Xi", "Upsilon", *_SYMBOLS}
"""Commands that are one symbol: Greek letters, and others that are read like them."""
_FUNCTIONS = """
sin cos tan cot sec csc asin acos atan sinh cosh tanh coth ln log lg exp gcd lcm max min det sgn
arccot arcsec arccsc arsinh arcosh artanh
"""
FUNCTIONS = frozenset(_FUNCTIONS.split())
WORDS = {
    **{name: name for name in FUNCTIONS},
    **{name: name for name in ("sqrt", "cbrt", "pi", "abs", "floor", "ceil", "binom")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    **{name: name for name in GREEK if len(name) > 2 and name not in ("angle", "triangle", "prime", "star", "circ")},
    **dict.fromkeys(("infinity", "inf", "oo"), "infty"),
    **dict.fromkeys(("degrees", "degree", "deg"), "degree"),
}
_NAME = re.compile("|".join([*sorted(WORDS, key=len, reverse=True), "."]))


@dataclass
class Token:
    text: str
    kind: str
    spaced: bool


def tokenised(text: str) -> list[Token]:
    """The tokens of a text; in a run of letters, those that spell a function or a constant become one command."""
    found: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(re.sub(r"(?<![\\A-Za-z])(?:np|math)\.(?=[a-z])", "", text)):
        kind = match.lastgroup or "other"
        if kind == "space":
            spaced = True
        elif kind == "word":
            for name in _NAME.findall(match[0]):
                known = name in WORDS
                found.append(Token("\\" + WORDS[name] if known else name, "command" if known else "letter", spaced))
                spaced = False
        else:
            found.append(Token("^" if kind == "power" else match[0], "other" if kind == "power" else kind, spaced))
            spaced = False
    return found


class Reader:
    """A place in a list of tokens, and what needs no grammar: numbers, subscripts."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place].text if place < len(self.tokens) else ""

    def take(self, *texts: str) -> bool:
        if self.peek() in texts and self.at < len(self.tokens):
            self.at += 1
            return True
        return False

    def need(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"`{text}` is missing")

    def integer(self) -> str:
        """The digits of a braced integer or of one bare digit, else nothing."""
        if self.peek() == "{" and self.peek(1).isdigit() and self.peek(2) == "}":
            self.at += 3
            return self.peek(-2)
        return self.digit() if self.peek().isdigit() else ""

    def digit(self) -> str:
        """One digit of the number that comes next: `\\frac43` is 4 over 3."""
        token = self.tokens[self.at]
        digit, rest = token.text[0], token.text[1:]
        if rest:
            self.tokens[self.at] = Token(rest, "number", False)
        else:
            self.at += 1
        return digit

    def mixed(self) -> Node | None:
        """`2\\frac{1}{2}` and `2 1/2`."""
        start = self.at
        if start >= len(self.tokens) or not self.peek().isdigit():
            return None
        whole = int(self.peek())
        part: tuple[str, str] | None = None
        if self.peek(1) == r"\frac":
            self.at += 2
            top, bottom = self.integer(), self.integer()
            if top and bottom:
                part = top, bottom
        elif (
            self.peek(1).isdigit() and self.peek(2) == "/" and self.peek(3).isdigit() and self.tokens[start + 1].spaced
        ):
            part = self.peek(1), self.peek(3)
            self.at += 4
        if part is None or int(part[1]) == 0:
            self.at = start
            return None
        value = whole + Fraction(int(part[0]), int(part[1]))
        return ("num", value, f"{whole} {part[0]}/{part[1]}")

    def subscript(self) -> str:
        if not self.take("{"):
            text = self.peek()
            self.at += 1
            return text
        depth, parts = 1, []
        while depth:
            text = self.peek()
            if not text:
                raise Unreadable("a subscript is never closed")
            depth += (text == "{") - (text == "}")
            parts.append(text)
            self.at += 1
        return "".join(parts[:-1])
