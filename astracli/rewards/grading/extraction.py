"""Where the final answer of a completion stands: thinking left out, then tag, box, announcement, formula, number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from astracli.rewards.grading import notation, units
from astracli.rewards.grading.answer_types import Words
from astracli.rewards.grading.answers import read
from astracli.rewards.grading.boxes import BOX, boxed
from astracli.rewards.grading.tokens import FUNCTIONS, WORDS
from astracli.rewards.grading.trees import Unreadable

Extraction = Literal["boxed_or_last_number", "boxed"]
Place = Literal["box", "tag", "said", "whole", "formula", "number", "none"]
_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|scratchpad|reflection)"
_THINK_OPEN = re.compile(
    rf"<{_NAMES}>|\[{_NAMES}\]|◁{_NAMES}▷|<\|begin_of_thought\|>|<\|channel\|>analysis", re.IGNORECASE
)
_THINK_CLOSE = re.compile(
    rf"</{_NAMES}>|\[/{_NAMES}\]|◁/{_NAMES}▷|<\|end_of_thought\|>|<\|channel\|>final(?:<\|message\|>)?", re.IGNORECASE
)
_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>")
_TAG = re.compile(r"<(answer|final_answer|final|solution)>(.*?)(?:</\1>|$)", re.IGNORECASE | re.DOTALL)
_FINAL = re.compile(r"final answer is:?\s*(\$[^$\n]+\$|\\\(.+?\\\)|[^\s$\\][^\n]*)", re.IGNORECASE)
_SAID = re.compile(
    r"(?:\banswers?|\boption|\bchoice|\bresult)\s*(?:\((?:in|to)[^()]{1,40}\))?\s*\**\s*"
    r"(?:(?:is|are|was|would be|will be|must be|should be)\b\s*(?:therefore|thus|then|simply|just|clearly)?\s*[:：]?"
    r"|[:：]|=)\s*\**\s*[:：]?"
    r"|【答案】|答案(?:应该|应当)?(?:是|为|等于|[:：])+|(?:结果|答)(?:是|为|[:：])+|####",
    re.IGNORECASE,
)
_PICKED = re.compile(
    r"(?:故|应|因此|所以)?(?:选择?|选项)(?:为|是)?\s*[:：]?\s*[(（]?([A-J](?:[\s、,，;；和与及或]*[A-J])*)[)）]?(?![A-Za-z])"
)
_CHOSEN = re.compile(
    r"\b(?i:choose|select|pick|option|choice)(?:\s+(?:option|choice|is|answer))*\s*:?\s*\**\(?([A-J])\)?"
    r"(?=[\s.,*]|$)(?!\s+(?:or|and)\b)"
)
_PLAIN_FRACTION = re.compile(r"(?<![\d.,/*^+)(-])[-−]?(?:\d+\s+)?\d+\s*/\s*\d+$")
_PAIR = re.compile(r"(\b(?:and|or)|,)?\s([\[(][^()\[\]]{1,80},[^()\[\]]{1,80}[\])])[.\s]*$")
"""A pair or an interval at the end of a sentence, and the word or comma that makes it one of several."""
_STOP = re.compile(
    r"(?<![A-Z\d])\.(?=\s+[A-Z\\$(]|\s*$)|(?<=[\dA-J])\.(?=\s+[A-Z][a-z]|\s*$)|[。！【]|\n"
    r"|,?\s+(?:because|since|which|where|as\s|so\s|I hope|when)\b"
)
_LETTER = re.compile(r"[*\s$({\\]*(?:text(?:bf)?\{)?\(?[A-J]\)?[})*\s$.]*")
_BULLET = re.compile(r"^\s*(?:[-–*•+]\s+|#+\s+|>\s+)")
_COPULA = re.compile(r"\b(?:is|are|equals|was|were)\b\s*:?\s*|:\s+(?=[-\d$\\])")
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
_DELIMITED = re.compile(r"(?<!\\)\$|(?<!\\)\\[(\[]")
_LETTERED = re.compile(r"\(?[A-J][.):]\s")
_TEXT = re.compile(r"\\(?:begin|end)\{[a-z]+\}|\\(?:text\w*|math[a-z]+|mbox)\s*\{[^{}]*\}")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_FUNCTIONS = FUNCTIONS | WORDS.keys() | {"mod", "lim"}
BARE_LIMIT = 200
"""Longest text, in characters, that can be an answer and nothing else."""


@dataclass(frozen=True)
class ExtractedAnswer:
    text: str
    """The answer as written; empty when nothing can be read."""
    place: Place
    last_words: str = ""
    """What math-verify may read instead of `text`, when the answer is no box."""


def without_thinking(text: str) -> str:
    """The text behind the thinking; thinking that is never closed hides all that follows it."""
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    closes = list(_THINK_CLOSE.finditer(text))
    if closes:
        text = text[closes[-1].end() :]
    opened = _THINK_OPEN.search(text)
    return text[: opened.start()] if opened else text


def read_answer(text: str, extraction: Extraction) -> tuple[str | None, bool]:
    """The answer in the last box, else the last number as written, and whether it stood in a box.

    The last box counts, and one that is never closed holds no answer: (None, True). Boxes side by side are a list.
    """
    text = without_thinking(text)
    found = boxed(text)
    if found is not None:
        return (found or None), True
    if extraction == "boxed":
        return None, False
    number = last_number(text)
    return (number[0] if number else None), False


def find(text: str, extraction: Extraction) -> ExtractedAnswer:
    """The final answer of a completion."""
    text = without_thinking(text)
    if "<|" in text:
        text = _TOKEN.sub(" ", text)
    box = boxed(text)
    if extraction == "boxed":
        return ExtractedAnswer(box or "", "box" if box is not None else "none")
    tags = list(_TAG.finditer(text))
    if tags and (box is None or BOX.search(text, tags[-1].end()) is None):
        inner = tags[-1][2].strip()
        in_tag = boxed(inner)
        return (
            ExtractedAnswer(in_tag, "box")
            if in_tag is not None
            else ExtractedAnswer(_said(inner) or _undressed(inner), "tag", inner)
        )
    if box is not None:
        said = announced(text, extraction)
        if said is None:
            return ExtractedAnswer(box, "box")
        content = _FINAL.search(said)
        return ExtractedAnswer(_said_content(content[1]) if content else "", "said", said)
    whole = bare(text)
    if whole is not None:
        return ExtractedAnswer(whole, "whole", text)
    said_answer = _said(text)
    if said_answer:
        return ExtractedAnswer(said_answer, "said", text)
    return unannounced(text)


def announces(text: str) -> bool:
    """Whether a text speaks of its answer at all, or is a letter."""
    if len(text) < 24 and _LETTER.fullmatch(text.strip()):
        return True
    return "answer" in text.lower() or _SAID.search(text) is not None or _CHOSEN.search(text) is not None


def tagged(text: str) -> bool:
    return _TAG.search(text) is not None


def bare(text: str) -> str | None:
    """The whole text as an answer when it is one expression and no prose (`\\dfrac{1}{3}`), else None."""
    text = _BULLET.sub("", text.strip()).strip()
    if len(text) < 16 and _LETTER.fullmatch(text):
        return text
    if not text or len(text) > BARE_LIMIT or "\n" in text or _DELIMITED.search(text):
        return None
    if _LETTERED.match(text) or (text.isalpha() and text.isascii()):
        return text
    words = {word.lower() for word in _PROSE.findall(_TEXT.sub("", text))}
    if not text.isascii() and re.search(r"[\u3040-\u9fff]", text):
        return None
    return text if words <= _FUNCTIONS else None


def announced(text: str, extraction: Extraction) -> str | None:
    """`final answer is $10,455$` and what follows, when it stands behind the last box and says no box itself."""
    if extraction == "boxed" or ("nswer" not in text and "NSWER" not in text):
        return None
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    said = list(_FINAL.finditer(text, boxes[-1].end()))
    return text[said[-1].start() :] if said else None


def _said_content(text: str) -> str:
    stop = _STOP.search(text)
    return _undressed(text[: stop.start()] if stop and not text.startswith(("$", "\\(")) else text)


def _said(text: str) -> str:
    """What follows the last `the answer is`, `Answer:`, `####`, `答案是` or `选`; empty without one."""
    picked = list(_PICKED.finditer(text)) or list(_CHOSEN.finditer(text))
    said = list(_SAID.finditer(text))
    if picked and (not said or picked[-1].start() >= said[-1].start()):
        return picked[-1][1] if "或" in picked[-1][1] else ", ".join(re.findall("[A-J]", picked[-1][1]))
    if not said:
        return ""
    rest = text[said[-1].end() :].lstrip(" \t*:：")
    rest = rest.lstrip("\n").lstrip() if not rest.split("\n", 1)[0].strip() else rest
    rest = _BULLET.sub("", rest)
    if option := re.match(r"[(（]?([A-J])[)）]?\s*(?:选项|项)", rest):
        return option[1]
    math = notation.MATH.match(rest)
    if math and not re.match(r"\s*(?:or|and|或|和|,|，|\\?%|to\b)", rest[math.end() :]):
        return _undressed(math[0])
    stop = _STOP.search(rest)
    rest = rest[: stop.start()] if stop else rest
    if _prose(rest) and (copula := list(_COPULA.finditer(rest))):
        rest = rest[copula[-1].end() :]
    return _undressed(rest)


def _prose(text: str) -> bool:
    """Whether a text has words that are none of mathematics."""
    return any(word.lower() not in _FUNCTIONS for word in _PROSE.findall(_TEXT.sub("", text)))


def _undressed(text: str) -> str:
    """Without Markdown, list marks and the dollar signs of formulas inside a sentence."""
    text = _BULLET.sub("", text.strip())
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
        if not _prose(match[0]) or "\\" in match[0] or len(match[0]) > len(text) - 4
    ]
    number = last_number(text)
    if formulas and (number is None or formulas[-1].end() >= number[1]):
        content = next(group for group in formulas[-1].groups() if group is not None)
        if _ranged(text[: formulas[-1].start()]):
            return ExtractedAnswer("", "formula", text)
        return ExtractedAnswer(content.strip(), "formula", text)
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
    rest = _undressed(sentence[joints[-1].end() :]) if joints else ""
    unit = re.search(r"(?<=[\w)])\s+([A-Za-z][A-Za-z /^\d]*)$", rest)
    if unit and (units.measure(unit[1]) or unit[1].endswith("units")):
        rest = rest[: unit.start()]
    formula = re.search(r"[-+*/^]|sqrt|pi|[π√²³]", rest.lstrip("-+")) and not re.search(
        r"[?!:;,|]|\b(?:or|to|and)\b", rest
    )
    return rest if formula and not _prose(rest) and not re.search(r"\d-\d", rest) and _readable(rest) else ""


def _readable(text: str) -> bool:
    try:
        return not isinstance(read(notation.plain(text), True), Words)
    except Unreadable:
        return False


def letter_set_bold(text: str) -> str:
    """The letter that is set bold last, `so **C** is correct`; empty without one."""
    bold = _set_bold(text)
    return bold.strip("() .") if _LETTER.fullmatch(bold) else ""


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
    return _undressed(sentence[joints[-1].end() :]) if joints else ""


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
