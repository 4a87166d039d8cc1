"""math-verify, for answers in a notation that `grading.answers` does not read: integrals, sums, limits, prose."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

on_import: Callable[[str], None] | None = None
"""Told `loading` before math-verify is imported and `loaded` behind it."""


@lru_cache(maxsize=1)
def load_math_verify() -> tuple[Any, Any]:
    """(parse, verify). Importing it takes about a second, so nothing does until an answer needs it."""
    import logging

    if on_import is not None:
        on_import("loading")
    from math_verify import parse, verify

    if on_import is not None:
        on_import("loaded")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return parse, verify


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> Any:
    """Golds are wrapped in a box: math-verify reads bare ones as prose."""
    parse, _ = load_math_verify()
    wrapped = gold if "\\boxed" in gold else f"\\boxed{{{gold.strip().strip('$')}}}"
    return parse(wrapped, parsing_timeout=None)


def verified(gold: str, text: str) -> bool | None:
    """Whether math-verify finds the gold in a text; None when it finds no answer there. It may take for ever."""
    parse, verify = load_math_verify()
    found = parse(text, parsing_timeout=None)
    if not found:
        return None
    # A set answers for its inequality, in both directions: `(1, 2)` and `1 < x < 2`.
    return bool(verify(_parse_gold(gold), found, timeout_seconds=None, allow_set_relation_comp=True))
