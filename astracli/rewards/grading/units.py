"""Units, currencies and percent signs around a number.

A unit that only one side writes is no difference; two known units must measure the same thing and are converted. Names
that are not known (`apples`) never decide.
"""

from __future__ import annotations

import re
from fractions import Fraction

_KNOWN: dict[str, tuple[str, Fraction]] = {}


def _add(dimension: str, factor: int | Fraction | str, *names: str) -> None:
    for name in names:
        _KNOWN[name] = dimension, Fraction(factor)


for _short, _factor in (
    ("mm", "1/1000"),
    ("cm", "1/100"),
    ("dm", "1/10"),
    ("m", 1),
    ("km", 1000),
    ("nm", "1/1000000000"),
):
    _add("length", _factor, _short)
_add("length", 1, "meter", "meters", "metre", "metres", "米")
_add("length", "1/100", "centimeter", "centimeters", "centimetre", "centimetres", "厘米")
_add("length", "1/1000", "millimeter", "millimeters", "millimetre", "millimetres", "毫米")
_add("length", 1000, "kilometer", "kilometers", "kilometre", "kilometres", "千米", "公里")
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
_add("volume", "1/1000", "L", "l", "liter", "liters", "litre", "litres", "升")
_add("volume", "1/1000000", "mL", "ml", "milliliter", "milliliters", "毫升")
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
_add("speed", 1, "mph", "miles per hour", "mi/h", "miles/hour")
_add("metric speed", 1, "m/s", "meters per second", "metres per second")
_add("metric speed", Fraction(5, 18), "km/h", "kph", "kmh", "kilometers per hour", "km/hr")
_add("force", 1, "N", "newton", "newtons")
_add("energy", 1, "J", "joule", "joules")
_add("energy", 1000, "kJ")
_add("electronvolt", 1, "eV")
_add("power", 1, "W", "watt", "watts")
_add("power", 1000, "kW")
_add("voltage", 1, "V", "volt", "volts")
_add("current", 1, "A", "amp", "amps")
_add("temperature", 1, "K", "kelvin")
_add("frequency", 1, "Hz")
_add("amount", 1, "mol", "moles", "mole")
_add("pressure", 1, "Pa")
_add("pressure", 1000, "kPa")
SINGLE = frozenset(name for name in _KNOWN if len(name) == 1 and name.isascii() and name.isalpha())
CURRENCY = "$€£¥₹"
_WORDS = r"\\words\{[^{}]*\}"
_EXPONENT = r"(?:\s*\^\s*(?:\{-?\d\}|-?\d))?"
_MARKED = re.compile(rf"(?:\s*(?:{_WORDS}|[A-Za-z]+|[/.]|\\cdot)\s*{_EXPONENT})+\.?\s*$")
_PLAIN = re.compile(rf"(?P<unit>[A-Za-z°¢.]+(?:[ /]+[A-Za-z.]+)*{_EXPONENT}(?:\s*/\s*[A-Za-z]+{_EXPONENT})?)\s*$")
_SYMBOL = re.compile(r"(.*[\d})])\s*(\\Omega|\\mu\s*[a-zA-Z]|\\(?:AA|ell))", re.DOTALL)
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


def take_percent(text: str) -> tuple[str, bool]:
    """The text without a percent sign at its end, and whether there was one."""
    stripped = _PERCENT.sub("", text)
    return stripped, stripped != text


def take_unit(text: str, known: frozenset[str], single: bool) -> tuple[str, str]:
    """(value, unit) of `12 cm`, `€12`, `5\\words{ m}`; the unit is empty when none is recognised.

    `known` are words of mathematics that are no units. `single`: a bare letter behind a number and a space is a unit,
    where it could be a variable too.
    """
    lead = re.match(rf"\s*([-+]?)\s*([{CURRENCY}]|(?:US|USD|Rs\.?)(?=\s*[$\d]))\s*\$?\s*", text)
    if lead:
        rest = take_unit(text[lead.end() :], known, single)[0]
        return lead[1] + rest, "$" if lead[2].startswith("U") else lead[2]
    if text and text[-1] in CURRENCY + "¢":
        return text[:-1].rstrip(), text[-1]
    if (cjk := _CJK.search(text)) and cjk.start() > 0:
        return text[: cjk.start()].rstrip(), cjk["unit"]
    if single and (sign := _SYMBOL.fullmatch(text)):
        return sign[1], sign[2].replace(" ", "")
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
    return (value.rstrip(), unit) if _is_unit(unit, value, known, single) else (text, "")


def _is_unit(unit: str, value: str, known: frozenset[str], single: bool) -> bool:
    words = re.findall(r"[A-Za-z°¢]+", unit)
    if any(word in known or f"{word.lower()}" in ("or", "and", "to", "not", "no") for word in words):
        return False
    if all(len(word) == 1 for word in words):
        return single and value != value.rstrip() and all(word in SINGLE for word in words)
    return all(word in _KNOWN or word.lower() in _KNOWN or len(word) >= 4 or len(words) > 1 for word in words)


def _named(unit: str) -> str:
    """`square inches`, `inches^2`, `in^{2}` -> a base name and an exponent: `inches^2`."""
    unit = " ".join(unit.replace("{", "").replace("}", "").replace(r"\cdot", " ").split()).strip(" .")
    unit = re.sub(r"\s*\^\s*", "^", unit)
    for pattern, power in ((_SQUARE, 2), (_CUBIC, 3)):
        if pattern.match(unit):
            return f"{pattern.sub('', unit)}^{power}"
    return unit


_SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "百": 100,
    "千": 1000,
    "万": 10**4,
    "亿": 10**8,
}


def take_scale(unit: str) -> tuple[int, str]:
    """(1000000, `dollars`) of `million dollars`."""
    for word, size in _SCALES.items():
        match = re.match(rf"{word}s?(?![a-z])\s*", unit, re.IGNORECASE)
        if match and not (word == "千" and unit[1:2] in "米克"):
            return size, unit[match.end() :]
    return 1, unit


def measure(unit: str) -> tuple[str, Fraction] | None:
    """(dimension, factor to its base unit), None for a unit that is not known."""
    if unit.startswith("base "):
        return unit, Fraction(1)
    base, _, power = unit.partition("^")
    base = base.strip()
    found = _KNOWN.get(base) or _KNOWN.get(base.lower())
    if found is None:
        return None
    exponent = int(power) if power.strip().isdigit() else 1
    return (found[0] if exponent == 1 else f"{found[0]}^{exponent}"), found[1] ** exponent


def factor(gold: str, answer: str) -> Fraction | None:
    """What an answer in its unit is multiplied with to be in the gold's; None when the two measure different things."""
    if not gold or not answer or gold == answer:
        return Fraction(1)
    first, second = measure(gold), measure(answer)
    if first is None or second is None:
        return Fraction(1)
    return second[1] / first[1] if first[0] == second[0] else None
