"""One notation for what models write: Unicode characters, spacing and font commands become plain LaTeX.

`plain` changes how an answer is written and never what it says. It is idempotent up to spaces.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ", "0123456789+-=()nixy", strict=True))
_SUBSCRIPT = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₘₖₐₓᵢⱼ", "0123456789+-=()nmkaxij", strict=True))
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_GREEK = {
    chr(code): rf"\{name} "
    for code, name in zip(
        [*range(0x3B1, 0x3C2), *range(0x3C3, 0x3CA)],
        [
            "alpha",
            "beta",
            "gamma",
            "delta",
            "epsilon",
            "zeta",
            "eta",
            "theta",
            "iota",
            "kappa",
            "lambda",
            "mu",
            "nu",
            "xi",
            "omicron",
            "pi",
            "rho",
            "sigma",
            "tau",
            "upsilon",
            "phi",
            "chi",
            "psi",
            "omega",
        ],
        strict=True,
    )
} | {"Γ": r"\Gamma ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Π": r"\Pi ", "Σ": r"\Sigma "}
_GREEK |= {"Φ": r"\Phi ", "Ψ": r"\Psi ", "Ω": r"\Omega ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "ϑ": r"\theta "}
_CHARACTERS = {
    **_GREEK,
    **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•‧", r"\cdot "),
    **dict.fromkeys("°º˚", r"\degree "),
    **dict.fromkeys("⟨〈", r"\langle "),
    **dict.fromkeys("⟩〉", r"\rangle "),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("∼～", r"\sim "),
    "÷": r"\div ",
    "∕": "/",
    "⁄": "/",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≦": r"\le ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≃": r"\approx ",
    "≅": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∨": r"\lor ",
    "∧": r"\land ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}",
    "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "′": "'",
    "’": "'",
    "。": ".",
    "→": r"\to ",
    "∗": "*",
}
_SPACES = dict.fromkeys(
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063\u200e\u200f\ufe0e\ufe0f")
_OVERLINE = "\u0305"
_SIZES = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|middle)(?![A-Za-z])\s*\.?"
)
_SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|enspace|thinspace|hspace\*?\{[^{}]*\}|hfill|newline)(?![A-Za-z]))|~"
)
_NOTHING = re.compile(r"\\!|\\(?:displaystyle|textstyle|limits|nolimits|phantom\{[^{}]*\}|rm|bf|it)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_RENAMED = [
    (re.compile(rf"\\(?:{old})(?![A-Za-z])\s*"), new)
    for old, new in (
        ("leq|leqslant|lte", r"\\le "),
        ("geq|geqslant|gte", r"\\ge "),
        ("lt", "<"),
        ("gt", ">"),
        ("neq", r"\\ne "),
        ("lbrace", r"\\{"),
        ("rbrace", r"\\}"),
        ("lbrack", "["),
        ("rbrack", "]"),
        ("dots|cdots|dotsc|dotsb|dotsm", r"\\ldots "),
        ("varnothing", r"\\emptyset "),
        ("backslash|smallsetminus", r"\\setminus "),
        ("vee", r"\\lor "),
        ("wedge", r"\\land "),
        ("dbinom|tbinom", r"\\binom "),
        ("varphi", r"\\phi "),
        ("varepsilon", r"\\epsilon "),
        ("vartheta", r"\\theta "),
        ("ast", "*"),
        ("colon", ":"),
        ("doteq|thickapprox|simeq|cong", r"\\approx "),
        ("lvert|rvert|vert|mid", "|"),
        ("arcsin", r"\\asin "),
        ("arccos", r"\\acos "),
        ("arctan", r"\\atan "),
        ("mathbb\\s*R", r"\\mathbb{R}"),
        ("Reals|reals|R", r"\\mathbb{R}"),
    )
]
_DEGREE = re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\(?:degree|textdegree)(?![A-Za-z])\s*")
_FONT = (
    r"(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|rm|emph"
    r"|underline|boxed|fbox|operatorname\*?|ensuremath|mathop|color\{[a-z]+\})"
)
_STYLED = re.compile(rf"\\{_FONT}\s*\{{([^{{}}]*)\}}")
_STYLED_LETTER = re.compile(rf"\\{_FONT}\s+([A-Za-z0-9])(?![A-Za-z])")
_THOUSANDS = re.compile(
    r"(?<![\d.^_{,])(\d{1,3})((?:\{,\}\d{3})+|(?:\\,\d{3})+|(?:\\ \d{3})+|(?: \d{3})+)(?![\d/]|\s*/)"
)
_GROUPED = re.compile(r"(?<![\w.,^])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_FORMULA = re.compile(r"(?<![\\$])\$(?!\$)([^$]*[\\=<>^_][^$]*)(?<!\\)\$")
"""A formula between dollar signs inside an answer: what looks like two amounts of money is none."""
_WORD = re.compile(r"[A-Za-z]{2,}")
_ORDINAL = re.compile(r"(\d)\s*(?:\^\s*)?\{?\s*\\(?:text|mathrm|textrm|mbox)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?")
_COMPOUND = re.compile(
    r"([\d})]\s*(?:\\[,;: ]|~|\s)*)\\(?:mathrm|text|textrm|mbox|rm)\s*"
    r"\{((?:[A-Za-z/.\s]|\\[,;:! ]|\^?-?\d|\^\{-?\d\})*\^\{-?\d\})\}"
)
"""A unit with exponents behind a number: `9.8\\,\\mathrm{m\\,s^{-2}}`."""
_UNIT_LETTERS = frozenset("msghLNJWVKC")
_BAR = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
_DOT = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?")
_BRACKET = re.compile(r"(?<![\d.])(\d*)\.(\d*)\((\d+)\)")
_ENDLESS = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*(?:\\ldots|\.\.\.)")


def plain(text: str) -> str:
    """An answer in one notation: ASCII and LaTeX commands, no sizes, fonts, thousands separators or outer dollars."""
    text = _outer(_ascii(_chinese_number(text.strip())))
    if "\\" in text or "{" in text:
        text = _latex(text)
    text = _repeating(text)
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = _SPACING.sub(" ", text)
    return _final_point(" ".join(text.split()))


def without_separators(text: str) -> str:
    """`1,234` -> `1234`: a number, where `plain` leaves open whether it is a list."""
    return _GROUPED.sub(lambda m: m[1].replace(",", ""), text)


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = _overlined(text)
    out: list[str] = []
    i = 0
    while i < len(text):
        char = text[i]
        for table, mark in ((_SUPERSCRIPT, "^"), (_SUBSCRIPT, "_")):
            if char in table:
                end = i
                while end < len(text) and text[end] in table:
                    end += 1
                out.append(f"{mark}{{{''.join(table[c] for c in text[i:end])}}}")
                i = end
                break
        else:
            out.append(_one(char, text[i + 1 :]))
            i += 1
    return "".join(out)


_CHINESE = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}


def _chinese_number(text: str) -> str:
    """A number below 10,000 that is written in Chinese numerals alone, in digits; any other text as it is."""
    total, digit = 0, 0
    for char in text:
        if char in _CHINESE:
            digit = _CHINESE[char]
        elif char in "十百千":
            total += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[char]
            digit = 0
        else:
            return text
    return str(total + digit) if text else text


def _one(char: str, rest: str) -> str:
    if char in _INVISIBLE:
        return ""
    if char in _SPACES:
        return " "
    if char in _ROOTS:
        return _ROOTS[char] + _root_argument(rest)
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    name = unicodedata.name(char, "")
    if name.startswith("VULGAR FRACTION"):
        top, _, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}"
    folded = unicodedata.normalize("NFKC", char)
    return _CHARACTERS.get(folded, folded)


def _root_argument(rest: str) -> str:
    """What tells a root sign before bare digits where it ends: nothing to add elsewhere."""
    return "\\rootsign " if re.match(r"\s*\d{2,}", rest) else ""


def _overlined(text: str) -> str:
    """Digits with a combining overline: `0.3̅` -> `0.\\overline{3}`."""
    return re.sub(rf"(?:\d{_OVERLINE})+", lambda m: r"\overline{" + m[0].replace(_OVERLINE, "") + "}", text)


def _outer(text: str) -> str:
    text = _FORMULA.sub(r" \1 ", text.strip()).strip()
    while True:
        before = text
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")):
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1:
                text = text[len(left) : -len(right)].strip()
        if text == before:
            return text


def _latex(text: str) -> str:
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text)  # `\\\\frac`, escaped twice
    text = re.sub(r"(\d),\s*\\!\s*(?=\d{3})", r"\1,", text)
    text = re.sub(r"\\rootsign\s*(\d+)", r"{\1}", text)
    text = _NOTHING.sub("", text)
    text = _SIZES.sub("", text)
    text = _FRACTIONS.sub(r"\\frac", text)
    text = re.sub(r"(\d)\{,\}(?=\d{3})", r"\1,", text)
    for pattern, new in _RENAMED:
        text = pattern.sub(new, text)
    text = _DEGREE.sub(r"\\degree ", text)
    text = _ORDINAL.sub(r"\1", text)
    text = _COMPOUND.sub(lambda m: m[1] + r"\words{" + re.sub(r"[{}]|\\[,;:! ]", " ", m[2]).strip() + "}", text)
    text = _STYLED_LETTER.sub(r" \1", text)
    while True:
        changed = _STYLED.sub(_unstyled, text)
        if changed == text:
            break
        text = changed
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace(r"\&", "&").replace(r"\_", "_")
    text = re.sub(r"\\(?:textdollar|pounds|euro)(?![A-Za-z])", lambda m: {"t": "$", "p": "£", "e": "€"}[m[0][1]], text)
    return re.sub(r"\\\(|\\\)|(?<!\\)\\\[(?!\d*pt)|(?<!\\)\\\]", " ", text)


def _unstyled(match: re.Match[str]) -> str:
    """The content of a font command; words stay marked, so that letters of prose are no variables."""
    content = match[1]
    if content.strip() in _UNIT_LETTERS and re.search(r"[\d)}]\s*(?:\\[,;: ]|~|\s)*$", match.string[: match.start()]):
        return rf"\words{{{content.strip()}}}"
    if _WORD.search(content) and not content.strip().startswith("\\"):
        if match[0].startswith("\\operatorname"):
            return rf"\{content.strip()} "
        return rf"\words{{{content.strip()}}}"
    script = match.string[: match.start()].rstrip().endswith(("^", "_"))
    return f"{{{content.strip()}}}" if script else f" {content.strip()} "


def _repeating(text: str) -> str:
    if "." not in text:
        return text
    text = _BAR.sub(lambda m: _fraction(m[1], m[2], m[3] or m[4]), text)
    text = _DOT.sub(lambda m: _fraction(m[1], m[2], m[3] + (m[4] or "") + (m[5] or "")), text)
    text = _BRACKET.sub(lambda m: _fraction(m[1], m[2], m[3]), text)
    return _ENDLESS.sub(_recurring, text)


def _recurring(match: re.Match[str]) -> str:
    """`0.1666...`: the digits that repeat at the end, when they do."""
    digits = match[2]
    for size in range(1, len(digits) // 2 + 1):
        block = digits[-size:]
        times = 1
        while digits.endswith(block * (times + 1)):
            times += 1
        if times >= (3 if size == 1 else 2):
            return _fraction(match[1], digits[: len(digits) - size * times], block)
    return match[0]


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    value = Fraction(int(whole + fixed or "0") * (10 ** len(repeated) - 1) + int(repeated)) / (
        10 ** len(fixed) * (10 ** len(repeated) - 1)
    )
    return rf"({value.numerator}/{value.denominator})"


def _final_point(text: str) -> str:
    """Without a point that ends the sentence, and without what is no part of an answer at its ends."""
    while text and (text[-1] in ",;" or (text[-1] == "." and not text.endswith(".."))):
        text = text[:-1].rstrip()
    return text.lstrip(":").strip()
