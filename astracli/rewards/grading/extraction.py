"""Where the final answer of a completion stands: thinking left out, then tag, box, announcement, formula, number."""

from __future__ import annotations

import re
from typing import Literal

from astracli.rewards.grading import notation
from astracli.rewards.grading.boxes import BOX, boxed
from astracli.rewards.grading.endings import (
    BARE_LIMIT,
    BULLET,
    LETTER,
    ExtractedAnswer,
    is_prose,
    last_number,
    unannounced,
    undressed,
)

Extraction = Literal["boxed_or_last_number", "boxed"]
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
_STOP = re.compile(
    r"(?<![A-Z\d])\.(?=\s+[A-Z\\$(]|\s*$)|(?<=[\dA-J])\.(?=\s+[A-Z][a-z]|\s*$)|[。！【]|\n"
    r"|,?\s+(?:because|since|which|where|as\s|so\s|I hope|when)\b"
)
_COPULA = re.compile(r"\b(?:is|are|equals|was|were)\b\s*:?\s*|:\s+(?=[-\d$\\])")
_DELIMITED = re.compile(r"(?<!\\)\$|(?<!\\)\\[(\[]")
_LETTERED = re.compile(r"\(?[A-J][.):]\s")


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
            else ExtractedAnswer(_said(inner) or undressed(inner), "tag", inner)
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
    if len(text) < 24 and LETTER.fullmatch(text.strip()):
        return True
    return "answer" in text.lower() or _SAID.search(text) is not None or _CHOSEN.search(text) is not None


def tagged(text: str) -> bool:
    return _TAG.search(text) is not None


def bare(text: str) -> str | None:
    """The whole text as an answer when it is one expression and no prose (`\\dfrac{1}{3}`), else None."""
    text = BULLET.sub("", text.strip()).strip()
    if len(text) < 16 and LETTER.fullmatch(text):
        return text
    if not text or len(text) > BARE_LIMIT or "\n" in text or _DELIMITED.search(text):
        return None
    if _LETTERED.match(text) or (text.isalpha() and text.isascii()):
        return text
    if not text.isascii() and re.search(r"[\u3040-\u9fff]", text):
        return None
    return None if is_prose(text) else text


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
    return undressed(text[: stop.start()] if stop and not text.startswith(("$", "\\(")) else text)


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
    rest = BULLET.sub("", rest)
    if option := re.match(r"[(（]?([A-J])[)）]?\s*(?:选项|项)", rest):
        return option[1]
    math = notation.MATH.match(rest)
    if math and not re.match(r"\s*(?:or|and|或|和|,|，|\\?%|to\b)", rest[math.end() :]):
        return undressed(math[0])
    stop = _STOP.search(rest)
    rest = rest[: stop.start()] if stop else rest
    if is_prose(rest) and (copula := list(_COPULA.finditer(rest))):
        rest = rest[copula[-1].end() :]
    return undressed(rest)
