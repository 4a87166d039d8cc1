"""Request bodies of the hub: read, checked, refused in words."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from starlette.requests import Request

from astracli.hub.wire import MAX_WAIT_S

T = TypeVar("T")


class BadBody(ValueError):
    """Answered with 400."""


def field(body: dict[str, Any], key: str, kind: type[T], default: Any = ...) -> T:
    """`body[key]`, checked. Raises BadBody naming the key and the value."""
    if key not in body:
        if default is ...:
            raise BadBody(f"`{key}` is missing")
        return default
    value = body[key]
    if value is None and default is None:
        return None  # type: ignore[return-value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadBody(f"`{key}` = {json.dumps(value, default=str)[:80]} is no {kind.__name__}")
    return value


def lease_ids(body: dict[str, Any]) -> list[int]:
    ids: list[Any] = field(body, "lease_ids", list)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise BadBody("`lease_ids` is no list of int")
    return ids


def wait_s(body: dict[str, Any]) -> float:
    return min(MAX_WAIT_S, max(0.0, field(body, "wait_s", float, 0.0)))


async def read_json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise BadBody(f"body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadBody("body is no JSON object")
    return body
