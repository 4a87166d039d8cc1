"""Expressions: from one notation (`notation.plain`) to a tree (`trees`).

LaTeX and plain notation may be mixed: `5\\sqrt(3)`, `pi/2`, `x**2`. Letters side by side are a product, mixed numbers
are sums.
"""

from __future__ import annotations

from fractions import Fraction

from astracli.rewards.grading.tokens import FUNCTIONS, GREEK, Reader, tokenised
from astracli.rewards.grading.trees import Node, TooLarge, Unreadable, canonical

_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_ACCENTS = frozenset(["overline", "overrightarrow", "vec", "hat", "dot", "ddot", "bar", "tilde"])
"""Of a letter, which they make another one."""
_ROUNDED = {"lfloor": ("floor", r"\rfloor"), "lceil": ("ceil", r"\rceil")}
_PREFIXES = _ACCENTS | _ROUNDED.keys() | {"frac", "sqrt", "cbrt", "binom", "abs", "floor", "ceil"}
"""Commands that begin a factor."""
_NO_CALL = frozenset("abcdeikmnrABCKMR")
_DEPTH = 200


def parse(text: str) -> Node:
    """The tree of a whole expression. Raises Unreadable."""
    if len(text) > 4000:
        raise TooLarge("too long")
    parser = _Parser(tokenised(text))
    node = parser.sum()
    if parser.at < len(parser.tokens):
        raise Unreadable(f"`{parser.tokens[parser.at].text}` is left over")
    return node


class _Parser(Reader):
    bar_depth = 0

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > _DEPTH:
            raise TooLarge("nested too deeply")
        parts: list[Node] = [self.product()]
        while (sign := self.peek()) in ("+", "-", r"\pm", r"\mp"):
            self.at += 1
            term = self.product()
            if sign in (r"\pm", r"\mp"):
                left = parts[0] if len(parts) == 1 else ("add", *parts)
                parts = [(sign[1:], left, term)]
            else:
                parts.append(term if sign == "+" else ("neg", term))
        self.depth -= 1
        node = parts[0] if len(parts) == 1 else ("add", *parts)
        return ("fn", "binom", node, self.sum()) if self.take(r"\choose") else node

    def product(self) -> Node:
        if self.take("-"):
            return ("neg", self.product())
        if self.take("+"):
            return self.product()
        if self.peek() in (r"\pm", r"\mp"):
            sign = self.peek()[1:]
            self.at += 1
            return (sign, ("num", Fraction(0), "0"), self.product())
        node = self.power()
        while True:
            if self.take("*", r"\cdot", r"\times"):
                node = _product(node, self.signed())
            elif self.take("/", r"\div"):
                node = ("div", node, self.signed())
            elif self.starts():
                if self.tokens[self.at].kind == "number" and self.tokens[self.at - 1].kind == "number":
                    raise Unreadable("two numbers side by side")
                node = _product(node, self.power())
            else:
                return node

    def signed(self) -> Node:
        if self.take("-"):
            return ("neg", self.signed())
        self.take("+")
        return self.power()

    def starts(self) -> bool:
        """Whether the next token can begin a factor."""
        if self.at >= len(self.tokens):
            return False
        token = self.tokens[self.at]
        if token.kind in ("number", "letter"):
            return True
        if token.kind == "command":
            name = token.text[1:]
            return name in GREEK or name in FUNCTIONS or name in _PREFIXES or token.text == "\\|"
        if token.text == "|":
            return self.bar_depth == 0 and sum(token.text == "|" for token in self.tokens[self.at :]) >= 2
        return token.text in ("(", "[", "{")

    def power(self) -> Node:
        node = self.mixed() or self.atom()
        while True:
            if self.take("^"):
                node = self.raised(node)
            elif self.take("!"):
                node = ("fn", "factorial", node)
            elif self.take(r"\degree"):
                node = ("fn", "degree", node)
            elif self.peek() == "'" and node[0] in ("sym", "call"):
                self.at += 1
                node = (node[0], node[1] + "'", *node[2:])
            else:
                return node

    def raised(self, node: Node) -> Node:
        if self.peek() == "{" and self.peek(1) in (r"\prime", "'") and self.peek(2) == "}" and node[0] == "sym":
            self.at += 3
            return ("sym", node[1] + "'")
        if self.take(r"\prime") and node[0] == "sym":
            return ("sym", node[1] + "'")
        exponent = self.script()
        if self.peek() == "^":
            self.at += 1
            exponent = self.raised(exponent)
        return ("pow", node, exponent)

    def script(self) -> Node:
        """What stands behind `^` or `_`: a group, or one thing. A bare exponent of plain notation may have digits."""
        if self.take("-"):
            return ("neg", self.script())
        self.take("+")
        return self.atom()

    def argument(self) -> Node:
        """An argument of a LaTeX command: a group, or one digit or letter."""
        if self.at < len(self.tokens) and self.tokens[self.at].kind == "number":
            digit = self.digit()
            return ("num", Fraction(int(digit)) if digit.isdigit() else Fraction(0), digit)
        return self.atom()

    def group(self, opening: str) -> Node:
        node = self.sum()
        self.need(_CLOSING[opening])
        return node

    def atom(self) -> Node:
        if self.at >= len(self.tokens):
            raise Unreadable("the expression ends early")
        self.depth += 1
        if self.depth > _DEPTH:
            raise TooLarge("nested too deeply")
        token = self.tokens[self.at]
        self.at += 1
        if token.kind == "number":
            node: Node = ("num", _value(token.text), token.text)
        elif token.kind == "letter":
            node = self.symbol(token.text)
        elif token.text in ("(", "[", "{"):
            bars, self.bar_depth = self.bar_depth, 0
            node = self.group(token.text)
            self.bar_depth = bars
        elif token.text == "|":
            self.bar_depth += 1
            node = ("fn", "abs", self.sum())
            self.need("|")
            self.bar_depth -= 1
        elif token.kind == "command":
            node = self.command(token.text[1:])
        else:
            raise Unreadable(f"`{token.text}` begins no expression")
        self.depth -= 1
        return node

    def symbol(self, name: str) -> Node:
        if self.take("_"):
            name = f"{name}_{self.subscript()}"
        if self.peek() == "(" and name[0] not in _NO_CALL and self.peek(2) == ")" and len(name) == 1:
            inner = self.tokens[self.at + 1]
            if inner.kind in ("number", "letter") or inner.text[1:] in GREEK:
                self.at += 1
                argument = self.group("(")
                return ("call", name, argument)
        if name == "C" and self.peek() == "(" and (pair := self.pair()) is not None:
            return ("fn", "binom", *pair)
        if self.peek() == "(" and name in ("f", "g", "h"):
            self.at += 1
            return ("call", name, self.group("("))
        return ("sym", name)

    def pair(self) -> tuple[Node, Node] | None:
        """The two arguments of `C(6, 2)`; None, and nothing read, when there are not two."""
        start = self.at
        self.at += 1
        try:
            first = self.sum()
            if self.take(","):
                return first, self.group("(")
        except Unreadable:
            pass
        self.at = start
        return None

    def command(self, name: str) -> Node:
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name == "cbrt":
            return ("fn", "root", self.argument(), ("num", Fraction(3), "3"))
        if name == "binom":
            if self.take("("):
                top = self.sum()
                self.need(",")
                bottom = self.group("(")
                return ("fn", "binom", top, bottom)
            return ("fn", "binom", self.argument(), self.argument())
        if name in _ROUNDED:
            function, closing = _ROUNDED[name]
            inner = self.sum()
            self.need(closing)
            return ("fn", function, inner)
        if name in ("abs", "floor", "ceil"):
            self.need("(")
            return ("fn", name, self.group("("))
        if name in _ACCENTS:
            return self.symbol(f"{name} {self.argument()}")
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi" and self.peek() != "_":
            return ("fn", "pi")
        if name == "infty":
            return ("fn", "infty")
        if name in GREEK:
            return self.symbol("\\" + name) if self.peek() == "_" else ("sym", "\\" + name)
        raise Unreadable(f"`\\{name}` is not known")

    def root(self) -> Node:
        degree: Node | None = None
        if self.take("["):
            degree = self.group("[")
        inner = self.argument()
        return ("fn", "sqrt", inner) if degree is None else ("fn", "root", inner, degree)

    def function(self, name: str) -> Node:
        exponent: Node | None = None
        base: Node | None = None
        for _ in range(2):
            if self.take("_"):
                base = self.argument()
            elif self.take("^"):
                exponent = self.argument()
        if self.peek() in ("(", "[", "{") or self.peek() == "":
            opening = self.peek()
            if not opening:
                raise Unreadable(f"`{name}` has no argument")
            self.at += 1
            arguments = [self.sum()]
            while self.take(","):
                arguments.append(self.sum())
            self.need(_CLOSING[opening])
        else:
            arguments = [self.bare_argument()]
        if name in ("sin", "cos", "tan") and exponent is not None and canonical(exponent) == ("num", -1):
            return ("fn", "a" + name, *arguments)
        node: Node = ("fn", name, *arguments) if base is None else ("fn", "log", *arguments, base)
        return node if exponent is None else ("pow", node, exponent)

    def bare_argument(self) -> Node:
        """`\\sin 2x`: factors side by side, up to a sign, a times sign or another function."""
        if self.take("-"):
            return ("neg", self.bare_argument())
        node = self.power()
        while self.starts() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", "[", "|"):
            node = _product(node, self.power())
        return node


def _product(left: Node, right: Node) -> Node:
    return ("mul", *left[1:], right) if left[0] == "mul" else ("mul", left, right)


def _value(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if not mantissa:
        raise Unreadable(f"`{text}` is no number")
    if exponent and abs(int(exponent)) > 100_000:
        raise TooLarge("the exponent is too large")
    if len(mantissa) > 20_000:
        raise TooLarge("the number is too long")
    value = Fraction(mantissa.rstrip(".") if mantissa != "." else "0")
    return value * Fraction(10) ** int(exponent) if exponent else value
