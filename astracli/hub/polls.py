"""Answers of the hub that a client waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Poll(Generic[T]):
    """An answer that a client waits for: `ask()` again at every change, until it is `ready` or `wait_s` have passed."""

    wait_s: float
    ask: Callable[[], T]
    ready: Callable[[T], bool]
