"""Units, currencies and percent signs around a number.

A unit that only one side writes is no difference; two known units must measure the same thing and are converted. Names
that are not known (`apples`) never decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from astracli.rewards.grading.tokens import WORDS

_KNOWN: dict[str, tuple[dict[str, int], Fraction]] = {}


def _add(dimensions: str, factor: int | Fraction | str, *names: str) -> None:
    """Units of the same dimensions (`length time^-2`) and their factor to the base units."""
    powers = {name: int(power or 1) for name, _, power in (part.partition("^") for part in dimensions.split(", "))}
    for name in names:
        _KNOWN[name] = powers, Fraction(factor)


_add("length", "1/10", "dm")
_add("length", "1/1000000000", "nm")
_add("length", 1, "m", "meter", "meters", "metre", "metres", "米")
_add("length", "1/100", "cm", "centimeter", "centimeters", "centimetre", "centimetres", "厘米")
_add("length", "1/1000", "mm", "millimeter", "millimeters", "millimetre", "millimetres", "毫米")
_add("length", 1000, "km", "kilometer", "kilometers", "kilometre", "kilometres", "千米", "公里")
_add("length", "0.0254", "inch", "inches", "in", "in.")
_add("length", "0.3048", "foot", "feet", "ft", "ft.")
_add("length", "0.9144", "yard", "yards", "yd", "yds")
_add("length", "1609.344", "mile", "miles", "mi")
_add("time", 1, "s", "sec", "secs", "second", "seconds", "秒")
_add("time", 60, "min", "mins", "minute", "minutes", "分钟")
_add("time", 3600, "h", "hr", "hrs", "hour", "hours", "小时")
_add("time", 86400, "day", "days", "天")
_add("time", 604800, "week", "weeks")
_add("month", 1, "month", "months")
_add("month", 12, "year", "years", "yr", "yrs", "年", "岁")
_add("mass", 1, "g", "gram", "grams", "克")
_add("mass", "1/1000", "mg", "milligram", "milligrams")
_add("mass", 1000, "kg", "kilogram", "kilograms", "千克", "公斤")
_add("mass", 1_000_000, "ton", "tons", "tonne", "tonnes", "吨")
_add("weight", 1, "lb", "lbs", "pound", "pounds")
_add("weight", "1/16", "oz", "ounce", "ounces")
_add("length^3", "1/1000", "L", "l", "liter", "liters", "litre", "litres", "升")
_add("length^3", "1/1000000", "mL", "ml", "cc", "milliliter", "milliliters", "毫升")
_add("gallon", 1, "gallon", "gallons", "gal")
_add("gallon", "1/4", "quart", "quarts")
_add("money", 1, "$", "dollar", "dollars", "usd", "USD", "bucks")
_add("money", "1/100", "cent", "cents", "¢")
_add("euro", 1, "€", "euro", "euros", "EUR")
_add("sterling", 1, "£", "GBP")
_add("yen", 1, "¥", "yen", "yuan", "元")
_add("rupee", 1, "₹", "rupee", "rupees", "Rs", "Rs.")
_add("angle", 1, "degree", "degrees", "deg", "度")
_add("radian", 1, "rad", "radian", "radians")
_add("celsius", 1, "°C", "celsius", "Celsius")
_add("fahrenheit", 1, "°F", "fahrenheit", "Fahrenheit")
_add("length, time^-1", "0.44704", "mph")
_add("length, time^-1", Fraction(5, 18), "kph", "kmh")
_add("mass, length, time^-2", 1000, "N", "newton", "newtons")
_add("mass, length^2, time^-2", 1000, "J", "joule", "joules")
_add("electronvolt", 1, "eV")
_add("mass, length^2, time^-3", 1000, "W", "watt", "watts")
_add("mass, length^2, time^-3, current^-1", 1000, "V", "volt", "volts")
_add("mass, length^2, time^-3, current^-2", 1000, "Ω", "ohm", "ohms")
_add("current", 1, "A", "amp", "amps", "ampere", "amperes")
_add("temperature", 1, "K", "kelvin", "kelvins")
_add("time^-1", 1, "Hz", "hertz")
_add("amount", 1, "mol", "moles", "mole")
_add("mass, length^-1, time^-2", 1000, "Pa", "pascal", "pascals")
_BARE = frozenset(_KNOWN) | {"kJ", "kW", "kPa"}
"""Units that need no mark such as `\\text` behind a number."""
SINGLE = frozenset(name for name in _BARE if len(name) == 1 and name.isascii() and name.isalpha())
_add("current, time", 1, "C", "coulomb", "coulombs")
_add("mass^-1, length^-2, time^4, current^2", "1/1000", "F", "farad", "farads")
_add("mass, time^-2, current^-1", 1000, "T", "tesla", "teslas")
_PREFIXES = {"p": -12, "n": -9, "μ": -6, "m": -3, "c": -2, "k": 3, "M": 6, "G": 9}
for _base in ("m", "s", "g", "L", "N", "J", "W", "V", "A", "Hz", "Pa", "mol", "eV", "Ω", "C", "F", "T", "K"):
    for _prefix, _power in _PREFIXES.items():
        _powers_of_base, _size = _KNOWN[_base]
        if _prefix + _base != "pm":  # behind a time, `pm` is the afternoon
            _KNOWN.setdefault(_prefix + _base, (_powers_of_base, _size * Fraction(10) ** _power))
_MEANINGS = {**dict.fromkeys(("pound", "pounds"), "£"), **dict.fromkeys(("degree", "degrees", "deg"), "°C")}
"""What a unit may mean besides: pounds of money, degrees of a thermometer."""
CURRENCY = "$€£¥₹"
_WORDS = r"\\words\{[^{}]*\}"
_EXPONENT = r"(?:\s*\^\s*(?:\{-?\d\}|-?\d))?"
_MARKED = re.compile(rf"(?:\s*(?:{_WORDS}|[A-Za-z]+|[/.]|\\cdot)\s*{_EXPONENT})+\.?\s*$")
_PLAIN = re.compile(rf"(?P<unit>[A-Za-z°¢.]+(?:[ /]+[A-Za-z.]+)*{_EXPONENT}(?:\s*/\s*[A-Za-z]+{_EXPONENT})?)\s*$")
_SYMBOL = re.compile(r"(.*[\d})])\s*(\\Omega|\\mu\s*(?:[a-zA-Z]{1,3}|\\Omega)|[kM]\s*\\Omega|\\(?:AA|ell))", re.DOTALL)
_FRACTION = re.compile(
    r"\\frac\s*\{((?:[^{}]|\\words\{[^{}]*\})+)\}\s*\{((?:[^{}]|\\words\{[^{}]*\}|\^\{-?\d\})+)\}\s*$"
)
_CJK = re.compile(r"(?P<unit>[\u4e00-\u9fff]+)\s*$")
_PERCENT = re.compile(r"\s*(?:%|\\words\{\s*(?:%|percent|pct)\s*\}|(?:percent|pct)\b)\s*$", re.IGNORECASE)
_NUMBERLIKE = re.compile(r"[-+]?[\d.,/()\s]*[\d)]|.*[})\d]", re.DOTALL)
_REMARK = re.compile(
    r"[=+*?<>|,;:]|(?<![\^{\d-])\d|\b(?:or|and|to|not|no|maybe|perhaps|possibly|either|neither|nor|if|but|approx\w*|about"
    r"|less|more|least|most|wait|actually|wrong)\b",
    re.IGNORECASE,
)
"""What behind a number is no unit: it says something about the answer."""
_SQUARE = re.compile(r"^(?:square|sq\.?)\s+", re.IGNORECASE)
_CUBIC = re.compile(r"^(?:cubic|cu\.?)\s+", re.IGNORECASE)
_PART = re.compile(r"(/|[^\s/^().\d-]+\.?)(\s*\^\s*-?\d+|\s+(?:squared|cubed)\b)?")
_AHEAD = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "cu.": 3}
_THERMOMETER = re.compile(r"(?:\bdegrees?\s*|\bdeg\s*|°\s*)(C|F)(?:elsius|ahrenheit)?\b", re.IGNORECASE)


def take_percent(text: str) -> tuple[str, bool]:
    """The text without a percent sign at its end, and whether there was one."""
    stripped = _PERCENT.sub("", text)
    return stripped, stripped != text


def take_unit(text: str, single: bool) -> tuple[str, str]:
    """(value, unit) of `12 cm`, `€12`, `5\\words{ m}`; the unit is empty when none is recognised.

    `single`: a bare letter behind a number and a space is a unit, where it could be a variable too.
    """
    lead = re.match(rf"\s*([-+]?)\s*([{CURRENCY}]|(?:US|USD|Rs\.?)(?=\s*[$\d]))\s*\$?\s*", text)
    if lead:
        rest = take_unit(text[lead.end() :], single)[0]
        return lead[1] + rest, "$" if lead[2].startswith("U") else lead[2]
    if text and text[-1] in CURRENCY + "¢":
        return text[:-1].rstrip(), text[-1]
    if (cjk := _CJK.search(text)) and cjk.start() > 0:
        return text[: cjk.start()].rstrip(), cjk["unit"]
    if (sign := _SYMBOL.fullmatch(text)) and (single or "Omega" in sign[2]):
        return sign[1], sign[2].replace(r"\Omega", "Ω").replace(r"\mu", "μ").replace(" ", "")
    if (fraction := _FRACTION.search(text)) and _NUMBERLIKE.fullmatch(text[: fraction.start()].rstrip()):
        unit = _named(re.sub(r"\\words", "", f"{fraction[1]} / {fraction[2]}"))
        if measure(unit) and (single or re.search("[A-Za-z]{2}", unit)):
            return text[: fraction.start()].rstrip(), unit
    place = text.find(r"\words{")
    if place > 0 and (_MARKED.fullmatch(text, place)):
        unit = re.sub(r"\\words\{([^{}]*)\}", r" \1 ", text[place:])
        return (text, "") if _REMARK.search(unit) else (text[:place].rstrip(), _named(unit))
    match = _PLAIN.search(text)
    if match is None or match.start() == 0:
        return text, ""
    value, unit = text[: match.start()], _named(match["unit"])
    if text[match.start() - 1] in "\\^_" or not _NUMBERLIKE.fullmatch(value.rstrip()):
        return text, ""
    return (value.rstrip(), unit) if _is_unit(unit, value, single) else (text, "")


def _is_unit(unit: str, value: str, single: bool) -> bool:
    words = re.findall(r"[A-Za-z°¢]+", unit)
    if any(word in WORDS or word.lower() in ("or", "and", "to", "not", "no") for word in words):
        return False
    if all(len(word) == 1 for word in words):
        return single and value != value.rstrip() and all(word in SINGLE for word in words)
    known_units = _KNOWN.keys() if single and value != value.rstrip() else _BARE
    return all(word in known_units or word.lower() in known_units or len(word) >= 4 or len(words) > 1 for word in words)


def _named(unit: str) -> str:
    """Without braces and commands; `square inches` is `inches^2`."""
    unit = " ".join(unit.replace("{", "").replace("}", "").replace(r"\cdot", " ").split()).strip(" .")
    unit = re.sub(r"\s*\^\s*", "^", unit)
    for pattern, power in ((_SQUARE, 2), (_CUBIC, 3)):
        if pattern.match(unit):
            return f"{pattern.sub('', unit)}^{power}"
    return unit


_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}


def take_scale(unit: str) -> tuple[int, str]:
    """(1000000, `dollars`) of `million dollars`."""
    for word, size in _SCALES.items() if unit else ():
        match = re.match(rf"{word}s?(?![a-z])\s*", unit, re.IGNORECASE)
        if match and not (word == "千" and unit[1:2] in "米克"):
            return size, unit[match.end() :]
    return 1, unit


@lru_cache(maxsize=4096)
def measure(unit: str) -> tuple[str, Fraction] | None:
    """(dimensions, factor to their base units) of `km/h`, `m s^-1`, `miles per hour`; None for an unknown unit."""
    if unit.startswith("base "):
        return unit, Fraction(1)
    total: dict[str, int] = {}
    size = Fraction(1)
    parts = list(_powers(unit))
    for name, power in parts:
        found = _KNOWN.get(name) or _KNOWN.get(name.lower())
        if found is None:
            return None
        size *= found[1] ** power
        for dimension, times in found[0].items():
            total[dimension] = total.get(dimension, 0) + times * power
    if not parts:
        return None
    return " ".join(f"{name}^{total[name]}" for name in sorted(total) if total[name]), size


def _powers(unit: str) -> Iterator[tuple[str, int]]:
    """The names of a unit and their powers; what stands behind `/` or `per` divides."""
    unit = _THERMOMETER.sub(lambda m: "°" + m[1].upper(), unit)
    sign, ahead = 1, 1
    for name, power in _PART.findall(unit):
        lower = name.lower()
        if name == "/" or lower in ("per", "a"):
            sign = -1
        elif lower in _AHEAD:
            ahead = _AHEAD[lower]
        else:
            power = power.strip(" ^")
            yield name.strip("."), sign * ahead * int({"": 1, "squared": 2, "cubed": 3}.get(power, power))
            ahead = 1


def _meanings(unit: str) -> list[tuple[str, Fraction] | None]:
    second = _MEANINGS.get(unit.lower())
    return [measure(unit), *([measure(second)] if second else [])]


def factor(gold: str, answer: str) -> Fraction | None:
    """What an answer in its unit is multiplied with to be in the gold's; None when the two measure different things."""
    if not gold or not answer or gold == answer:
        return Fraction(1)
    for first in _meanings(gold):
        for second in _meanings(answer):
            if first is None or second is None:
                return Fraction(1)
            if first[0] == second[0]:
                return second[1] / first[1]
    return None
