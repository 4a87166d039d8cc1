"""Both ends of the hub's HTTP: bodies to arguments, answers to dataclasses and back. No key is unknown or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import msgpack
import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

from astracli.errors import RunFailed
from astracli.hub.types import BadRequest, NextBatch

MAX_WAIT_S = 10.0
"""Longest long poll; a request that asks for more gets this."""
LARGEST = 2**63 - 1
"""Largest integer that SQLite stores."""
JSON, MSGPACK = "application/json", "application/msgpack"


def plain_json(value: Any) -> bytes:
    """JSON of plain values and dataclasses, with null for NaN and infinities."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


def called_with_body(call: Callable[..., Any]) -> Callable[[bytes], Any]:
    """`call` with the keys of a JSON object as its arguments. Raises BadRequest when those are not its own."""
    strict = validate_call(config=ConfigDict(strict=True))(call)

    def from_body(body: bytes) -> Any:
        try:
            arguments = pydantic_core.from_json(body or b"{}", allow_inf_nan=False)
        except ValueError as error:
            raise BadRequest(f"body is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise BadRequest("body is no JSON object")
        refuse_large(arguments)
        try:
            return strict(**arguments)
        except ValidationError as error:
            raise BadRequest(_complaints(error)) from None

    return from_body


def refuse_large(value: Any) -> None:
    """Raise BadRequest for an integer, anywhere in plain values, that the hub's file cannot hold."""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise BadRequest(f"a number of {value.bit_length()} bits is too large")
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        refuse_large(part)


def pack_answer(answer: Any) -> tuple[bytes, str]:
    """(body, media type)"""
    if isinstance(answer, NextBatch):
        return msgpack.packb(asdict(answer)), MSGPACK
    return plain_json(answer), JSON


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def unpack_answer(kind: Any, body: bytes, media_type: str, what: str) -> Any:
    """The inverse of `pack_answer`. Raises RunFailed when the answer is not of that kind."""
    try:
        if media_type == MSGPACK:
            return _adapter(kind).validate_python(msgpack.unpackb(body))
        return _adapter(kind).validate_json(body, strict=True)
    except ValidationError as error:
        raise RunFailed(
            f"the hub's answer to {what} is none that this process reads: {_complaints(error)}",
            "all processes of a run need the same version of astra",
        ) from None


def _complaints(error: ValidationError) -> str:
    words = []
    for item in error.errors(include_url=False):
        key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"].startswith("missing"):
            words.append(f"`{key}` is missing")
        elif item["type"] == "unexpected_keyword_argument":
            words.append(f"there is no `{key}`")
        else:
            value = json.dumps(item["input"], default=str)[:80]
            words.append(f"`{key}` = {value}: {message[0].lower()}{message[1:]}" if key else message)
    return "; ".join(words)
