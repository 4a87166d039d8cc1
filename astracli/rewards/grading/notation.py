"""One notation for what models write: Unicode characters, spacing and font commands become plain LaTeX.

`plain` changes how an answer is written and never what it says. It is idempotent up to spaces.
"""

from __future__ import annotations

import re
from fractions import Fraction

from astracli.rewards.grading import units
from astracli.rewards.grading.characters import as_latex, chinese_number

MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
"""A formula in prose, between its delimiters."""
_SIZES = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|big|Big|bigg|Bigg|middle)(?![A-Za-z])\s*\.?"
)
_SPACING = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|enspace|thinspace|hspace\*?\{[^{}]*\}|hfill|newline)(?![A-Za-z]))|~"
)
_NOTHING = re.compile(r"\\!|\\(?:displaystyle|textstyle|limits|nolimits|phantom\{[^{}]*\}|rm|bf|it)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_OTHER_NAMES = """
le leq leqslant lte;  ge geq geqslant gte;  ne neq;  lor vee;  land wedge;  setminus backslash smallsetminus;
ldots dots cdots dotsc dotsb dotsm;  approx doteq thickapprox simeq cong;  emptyset varnothing;
phi varphi;  epsilon varepsilon;  theta vartheta;  binom dbinom tbinom;  asin arcsin;  acos arccos;  atan arctan
"""
"""A command, and others that mean the same."""
_RENAMED = {old: rf"\{new} " for new, *others in map(str.split, _OTHER_NAMES.split(";")) for old in others}
_RENAMED |= {"lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "ast": "*"}
_RENAMED |= {"colon": ":"} | dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|")
_RENAMED |= dict.fromkeys(("Reals", "reals", "R"), r"\mathbb{R}")
_COMMAND = re.compile(rf"\\({'|'.join(_RENAMED)})(?![A-Za-z])\s*")
_DEGREE = re.compile(
    r"(?<=[\d)}])\^\s*(?:o(?![A-Za-z])|\{\s*o\s*\})|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\(?:degree|textdegree)(?![A-Za-z])\s*"
)
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
    r"\{((?:[A-Za-z/.~\s]|\\[,;:! ]|\\cdot(?![A-Za-z])|\^?-?\d|\^\{-?\d\})*\^\{-?\d\})\}"
)
"""A unit with exponents behind a number: `9.8\\,\\mathrm{m\\,s^{-2}}`."""
_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SPELLED = re.compile(rf"(?:\\words\{{\s*)?({'|'.join(_NUMERALS)})(?:\s*\}})?(?:\s*\(\d+\))?", re.IGNORECASE)
"""A small number in a word: `nine`, `nine (9)`."""
_UNIT_LETTERS = frozenset("msghLNJWVKC")
_BEHIND_NUMBER = re.compile(r"[\d)}]\s*(?:\\[,;: ]|~|\s)*$")
_COMBINATIONS = re.compile(r"(?<![A-Za-z\\])C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?")
"""`C_{10}^{3}`, ten choose three."""
_BAR = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
_DOT = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?")
_BRACKET = re.compile(r"(?<![\d.])(\d*)\.(\d*)\((\d+)\)")
_ENDLESS = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*(?:\\ldots|\.\.\.)")


def content_of(formula: re.Match[str]) -> str:
    """What stands between the delimiters of a `MATH`."""
    return str(formula[formula.lastindex or 0])


def plain(text: str) -> str:
    """An answer in one notation: ASCII and LaTeX commands, no sizes, fonts, thousands separators or outer dollars."""
    text = _outer(as_latex(chinese_number(text.strip())))
    if "\\" in text or "{" in text:
        text = _latex(text)
    text = _COMBINATIONS.sub(r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<=\d)'(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d) ?e ?(?=-?\d+$)", "e", text)
    text = _repeating(text)
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"^an? (?=[\d.]+ ?%)", "", _final_point(" ".join(text.split())))
    spelled = _SPELLED.fullmatch(text)
    return str(_NUMERALS.index(spelled[1].lower())) if spelled else text


def without_separators(text: str) -> str:
    """`1,234` -> `1234`: a number, where `plain` leaves open whether it is a list."""
    return _GROUPED.sub(lambda m: m[1].replace(",", ""), text)


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
    text = _COMMAND.sub(lambda m: _RENAMED[m[1]], re.sub(r"\\mathbb\s*R(?![A-Za-z])\s*", r"\\R ", text))
    text = _DEGREE.sub(r"\\degree ", text)
    text = _ORDINAL.sub(r"\1", text)
    text = _COMPOUND.sub(lambda m: m[1] + r"\words{" + re.sub(r"[{}~]|\\[,;:! ]", " ", m[2]).strip() + "}", text)
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
    content = match[1].replace("~", " ")
    if content.strip() in _UNIT_LETTERS and _BEHIND_NUMBER.search(match.string[: match.start()]):
        return rf"\words{{{content.strip()}}}"
    if len(content.strip()) > 1 and _BEHIND_NUMBER.search(match.string[: match.start()]) and units.measure(content):
        return rf"\words{{{content.strip()}}}"
    if content.strip()[:1].isdigit():
        return f" {content.strip()} "
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
    return text.lstrip(":").strip() if not text.startswith("=") else text[1:].strip()
