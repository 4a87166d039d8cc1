"""Characters outside ASCII that models write, as LaTeX: `½`, `x²`, `√2`, `−13`, full-width digits, Chinese numerals."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPT: dict[str, str | int | None] = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ", "0123456789+-=()nixy", strict=True))
_SUBSCRIPT: dict[str, str | int | None] = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₘₖₐₓᵢⱼ", "0123456789+-=()nmkaxij", strict=True))
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_GREEK = """
alpha α  beta β  gamma γ  delta δ  epsilon εϵ  zeta ζ  eta η  theta θϑ  iota ι  kappa κ  lambda λ  mu μ  nu ν  xi ξ
omicron ο  pi π  rho ρ  sigma σ  tau τ  upsilon υ  phi φϕ  chi χ  psi ψ  omega ω
Gamma Γ  Delta Δ  Theta Θ  Lambda Λ  Pi Π  Sigma Σ  Phi Φ  Psi Ψ  Omega Ω
"""
_SIGNS = """
times ×✕✖⨯  cdot ·⋅∙•‧  degree °º˚  langle ⟨〈  rangle ⟩〉  sim ∼～  div ÷  pm ±  mp ∓  infty ∞  ne ≠  to →
le ≤⩽≦  ge ≥⩾≧  approx ≈≃≅  cup ∪  cap ∩  setminus ∖  in ∈  emptyset ∅  lor ∨  land ∧  ldots …⋯
lfloor ⌊  rfloor ⌋  lceil ⌈  rceil ⌉  angle ∠
"""
GREEK_NAMES = frozenset(re.findall("[A-Za-z]+", _GREEK))
"""As LaTeX commands without the backslash."""
_CHARACTERS = {
    **{char: rf"\{name} " for name, chars in re.findall(r"(\w+) (\S+)", _GREEK + _SIGNS) for char in chars},
    **{char: rf"\mathbb{{{letter}}}" for char, letter in zip("ℝℤℚℕℂ", "RZQNC", strict=True)},
    **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
    **dict(zip("，、∕⁄′’。∗", ",,//''.*", strict=True)),
}
_SPACES = frozenset("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000")
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063\u200e\u200f\ufe0e\ufe0f")
_OVERLINE = "\u0305"
_OVERLINED = re.compile(rf"(?:\d{_OVERLINE})+")
"""Digits with a combining overline: `0.3̅` is `0.\\overline{3}`."""
_ROOT = re.compile(r"([√∛∜])(?=(\s*\d{2,})?)")
"""A root sign, and the bare digits behind it, whose end `\\rootsign` marks."""


def as_latex(text: str) -> str:
    if text.isascii():
        return text
    text = _OVERLINED.sub(lambda m: rf"\overline{{{m[0].replace(_OVERLINE, '')}}}", text)
    for mark, table in (("^", _SUPERSCRIPT), ("_", _SUBSCRIPT)):
        text = re.sub(f"([{''.join(table)}]+)", rf"{mark}{{\1}}", text).translate(str.maketrans(table))
    text = _ROOT.sub(lambda m: _ROOTS[m[1]] + (" " if m[2] is None else r"\rootsign "), text)
    return "".join(map(_one, text))


_CHINESE = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}


def chinese_number(text: str) -> str:
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


def _one(char: str) -> str:
    if char.isascii():
        return char
    if char in _INVISIBLE:
        return ""
    if char in _SPACES:
        return " "
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    name = unicodedata.name(char, "")
    if name.startswith("VULGAR FRACTION"):
        top, _, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}"
    folded = unicodedata.normalize("NFKC", char)
    return _CHARACTERS.get(folded, folded)
