"""What both ends of the hub's HTTP agree on."""

from __future__ import annotations

import math
from typing import Any

MAX_WAIT_S = 10.0
"""Longest long poll; a request that asks for more gets this."""


def finite(value: Any) -> Any:
    """The same JSON value with None for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
