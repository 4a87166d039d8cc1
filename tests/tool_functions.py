"""Functions that tests use as tools: they are imported by the process of the tools."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated, Literal

from pydantic import Field

calls = 0


def weather(
    city: str, days: int = 1, unit: Literal["C", "F"] = "C", tags: list[str] | None = None
) -> dict[str, object]:
    """Looks up the weather.

    Args:
        city (str): where,
            in words
        days: how many
    """
    return {"city": city, "days": days, "unit": unit, "tags": tags}


async def slow(seconds: Annotated[float, Field(ge=0)]) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "waited"


def sleeps(seconds: float) -> str:
    """Sleeps, and starts a process that would live on."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(f"/proc/self/stat"):  # noqa: F541
                time.sleep(300)
        os._exit(0)
    time.sleep(seconds)
    return str(os.getpid())


def counts() -> int:
    """How often this process has been asked."""
    global calls
    calls += 1
    return calls


def raises(words: str) -> str:
    """Raises."""
    raise LookupError(words)


def untyped(a, b):  # type: ignore[no-untyped-def]
    """Says too little."""


def silent(a: int) -> int:
    return a


def many(*numbers: int) -> int:
    """Cannot be called by name."""
    return sum(numbers)
