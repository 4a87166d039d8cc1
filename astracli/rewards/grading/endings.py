"""What a completion ends with, where it neither boxes nor announces its answer: a formula, a number, a word in bold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from astracli.rewards.grading import notation, units
from astracli.rewards.grading.answer_types import Words
from astracli.rewards.grading.answers import read
from astracli.rewards.grading.tokens import WORDS
from astracli.rewards.grading.trees import Unreadable

Place = Literal["box", "tag", "said", "whole", "formula", "number", "none"]
_PLAIN_FRACTION = re.compile(r"(?<![\d.,/*^+)(-])[-−]?(?:\d+\s+)?\d+\s*/\s*\d+$")
_PAIR = re.compile(r"(\b(?:and|or)|,)?\s([\[(][^()\[\]]{1,80},[^()\[\]]{1,80}[\])])[.\s]*$")
"""A pair or an interval at the end of a sentence, and the word or comma that makes it one of several."""
LETTER = re.compile(r"[*\s$({\\]*(?:text(?:bf)?\{)?\(?[A-J]\)?[})*\s$.]*")
BULLET = re.compile(r"^\s*(?:[-–*•+]\s+|#+\s+|>\s+)")
_JOINT = re.compile(
    r"\b(?:is|are|equals|was|were|be)\b\s*"
    r"(?:(?:therefore|thus|then|simply|just|exactly|equal to|given by|an?|the)\s+)?:?\s*|(?<![<>!=])=\s*"
)
_RATIO = re.compile(r"\bratio\b[^.\n]{0,120}?\b(?:is|be|was|=)\s*(\d+)\s+to\s+(\d+)[.*\s]*$")
_CIRCLED = re.compile("[①-⑳](?:[、,，和与及]*[①-⑳])*")
"""Numbers of statements in Chinese problems: `①③`."""
_UNIT = re.compile(r" ([A-Za-z]{2,})(?=[\s.,;*)]|$)")
_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z*])|\n")
_LEAD = re.compile(r"[\s*_]*(yes|no|true|false)\b(?=[*_]*\s*(?:[,.;:!—–]|$))", re.IGNORECASE)
_UNDECIDED = re.compile(r"\b(?:or|not|either|neither|nor|maybe|perhaps|isn't|wrong|incorrect)\b", re.IGNORECASE)
_GIVEN_UP = re.compile(
    r"\b(?:I|we)\s*(?:'m |am |was |are |were )?"
    r"(?:cannot|can't|can not|could not|couldn't|unable to|not able to|failed to)\s+(?:\w+\s+){0,2}?"
    r"(?:solve|determine|answer|find|complete|finish|compute|figure)\b|\bI (?:don't|do not) know\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"(\*\*|__)(.+?)\1")
_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_RANGE = re.compile(
    r"(?:[\d%)]|°)\s*(?:or|to|and/or|through|–|—|~|or maybe|or perhaps)\s*\$?$|\bbetween\s+\S{1,12}\s+and\s*\$?$",
    re.IGNORECASE,
)
_BARE_BEFORE = frozenset(" \t\n$=:(€£*、，。：是为有")
_GOES_ON = re.compile(r"[\s$*)\\]*(?:or|to|through|–|—)\s", re.IGNORECASE)
_BARE_AFTER = re.compile(r"(?:st|nd|rd|th)?\.?(?:[\s$,;:!?)*°%€\u3000-\u9fff\uff00-\uffef]|$)")
_TEXT = re.compile(r"\\(?:begin|end)\{[a-z]+\}|\\(?:text\w*|math[a-z]+|mbox)\s*\{[^{}]*\}")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_FUNCTIONS = WORDS.keys() | {"mod", "lim"}
BARE_LIMIT = 200
"""Longest text, in characters, that can be an answer and nothing else."""


@dataclass(frozen=True)
class ExtractedAnswer:
    text: str
    """The answer as written; empty when nothing can be read."""
    place: Place
    last_words: str = ""
    """What math-verify may read instead of `text`, when the answer is no box."""


def is_prose(text: str) -> bool:
    """Whether a text has words that are none of mathematics."""
    return any(word.lower() not in _FUNCTIONS for word in _PROSE.findall(_TEXT.sub("", text)))


def undressed(text: str) -> str:
    """Without Markdown, list marks and the dollar signs of formulas inside a sentence."""
    text = BULLET.sub("", text.strip())
    text = _BOLD.sub(r"\2", text).strip("*_ ")
    bare = re.sub(r"\\\$", "", text)
    if bare.count("$") and bare.count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]", " ", text).strip()
    return text if text.endswith("..") else text.rstrip(".。;；,，").strip()


def unannounced(text: str) -> ExtractedAnswer:
    """The last formula or the last number, whichever ends later; an expression in plain text behind `is` or `=`."""
    end = text[-300:]
    if ("not " in end or "n't " in end or "nable " in end or "failed " in end) and _GIVEN_UP.search(end):
        return ExtractedAnswer("", "none", "")
    if ratio := _RATIO.search(end):
        return ExtractedAnswer(f"{ratio[1]}:{ratio[2]}", "formula", text)
    formulas = [
        match
        for match in notation.MATH.finditer(text)
        if not is_prose(match[0]) or "\\" in match[0] or len(match[0]) > len(text) - 4
    ]
    number = last_number(text)
    if formulas and (number is None or formulas[-1].end() >= number[1]):
        if _ranged(text[: formulas[-1].start()]):
            return ExtractedAnswer("", "formula", text)
        return ExtractedAnswer(notation.content_of(formulas[-1]).strip(), "formula", text)
    circled = list(_CIRCLED.finditer(text))
    if circled and (number is None or circled[-1].end() > number[1]):
        return ExtractedAnswer(re.sub("[、,，和与及]", "", circled[-1][0]), "formula", text)
    tail = "" if number and _alone(text, number) else _tail(text)
    if tail and not (number and tail == number[0]):
        return ExtractedAnswer(tail, "formula", text)
    if number is None:
        return ExtractedAnswer("", "none", text)
    if _ranged(text[: number[2]]):
        return ExtractedAnswer("", "number", "")
    pair = _PAIR.search(text)
    if pair:
        return ExtractedAnswer("" if _RANGE.search(text[: pair.start() + 1]) or pair[1] else pair[2], "formula", text)
    fraction = _PLAIN_FRACTION.search(text[: number[1]])
    if fraction and _BARE_AFTER.match(text, number[1]):
        return ExtractedAnswer(fraction[0].replace("−", "-"), "formula", text)
    unit = _UNIT.match(text, number[1])
    return ExtractedAnswer(number[0] + (f" {unit[1]}" if unit and units.measure(unit[1]) else ""), "number", text)


def _alone(text: str, number: tuple[str, int, int]) -> bool:
    """Whether the last number ends the text and follows a word or an equals sign: no part of a longer expression."""
    before = text[: number[2]].rstrip(" $")[-1:]
    return not text[number[1] :].strip(" .$*\n") and (before.isalpha() or before in "=:")


def _tail(text: str) -> str:
    """`2*sqrt(3)` of `... so the area is 2*sqrt(3) cm.`; empty where the last sentence ends with no expression."""
    sentence = _SENTENCES.split(text.rstrip()[-2 * BARE_LIMIT :])[-1]
    if "$" in sentence or "\\" in sentence or len(sentence) > BARE_LIMIT:
        return ""
    joints = list(_JOINT.finditer(sentence))
    rest = undressed(sentence[joints[-1].end() :]) if joints else ""
    unit = re.search(r"(?<=[\w)])\s+([A-Za-z][A-Za-z /^\d]*)$", rest)
    if unit and (units.measure(unit[1]) or unit[1].endswith("units")):
        rest = rest[: unit.start()]
    formula = re.search(r"[-+*/^]|sqrt|pi|[π√²³]", rest.lstrip("-+")) and not re.search(
        r"[?!:;,|]|\b(?:or|to|and)\b", rest
    )
    return rest if formula and not is_prose(rest) and not re.search(r"\d-\d", rest) and _readable(rest) else ""


def _readable(text: str) -> bool:
    try:
        return not isinstance(read(notation.plain(text), True), Words)
    except Unreadable:
        return False


def letter_set_bold(text: str) -> str:
    """The letter that is set bold last, `so **C** is correct`; empty without one."""
    bold = _set_bold(text)
    return bold.strip("() .") if LETTER.fullmatch(bold) else ""


def worded(text: str, yes_or_no: bool) -> str:
    """The answer in words of a completion that announces none: what is set bold last, or ends the last sentence.

    To a question of yes or no it is first the word that begins the last paragraph.
    """
    if yes_or_no and (lead := _LEAD.match(text.strip().rsplit("\n\n", 1)[-1])):
        return lead[1]
    if bold := _set_bold(text):
        return bold
    sentence = _SENTENCES.split(text.rstrip()[-2 * BARE_LIMIT :])[-1]
    joints = list(_JOINT.finditer(sentence))
    return undressed(sentence[joints[-1].end() :]) if joints else ""


def _set_bold(text: str) -> str:
    """What stands in bold in the last sentence that has it; empty when it is one of several, or denied."""
    for sentence in reversed(_SENTENCES.split(text.strip())):
        if found := list(_BOLD.finditer(sentence)):
            return found[0][2] if len(found) == 1 and not _UNDECIDED.search(sentence) else ""
    return ""


def _ranged(before: str) -> bool:
    """Whether what ends here goes on with a range or a hedge: `149 or `."""
    return _RANGE.search(before[-32:]) is not None


def only_number(text: str) -> str | None:
    """The number of a phrase that holds one number and no formula: `一共有36个苹果`."""
    text = re.sub(r"^([A-Za-z -]+)\((\d+)\)$", r"\1 \2", text)  # `nine (9)`
    found = {match[0].lstrip("-−+") for match in _NUMBER.finditer(text)}
    number = last_number(text)
    return (
        number[0]
        if number and len(found) == 1 and not re.search(r"[\\^=/*()\[\]{}<>≤≥!]", text) and ends_bare(text)
        else None
    )


def last_number(text: str) -> tuple[str, int, int] | None:
    """(as written, end, start) of the last number. A mark of a list or a hyphen is no sign."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    written, start = last[0], last.start()
    if written[0] in "-−+" and start and (text[start - 1].isalnum() or text[start - 1] in ")]}%°"):
        written, start = written[1:], start + 1
    return written.replace("−", "-"), last.end(), start


def ends_bare(text: str) -> bool:
    """Whether the last number stands alone, not inside a formula such as `8/3` or `\\sqrt{5}`."""
    found = last_number(text)
    if found is None:
        return False
    _, end, start = found
    before = text[start - 1 : start]
    if _ranged(text[:start]) or before in "-−–":
        return not before and _BARE_AFTER.match(text, end) is not None
    if before == "(" and text[: start - 1].rstrip().endswith(("*", "^", "/", "+", "-", "=")):
        return False  # `10 ** (-2)`
    if _GOES_ON.match(text, end):
        return False
    return (not before or before in _BARE_BEFORE) and _BARE_AFTER.match(text, end) is not None
