"""What the HTTP servers of our own engines share: bodies, errors, a stream of answers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from astracli.errors import UserError
from astracli.process import intact


def error(status: int, message: str) -> JSONResponse:
    message = message.encode("utf-8", "backslashreplace").decode()  # JSON may name half a character
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


async def json_body(request: Request) -> dict[str, Any]:
    raw = await request.body()
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as wrong:
        raise UserError(f"the body is not JSON: {wrong!s:.200}") from None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


async def events(answers: AsyncIterator[tuple[int, dict[str, Any]]]) -> AsyncIterator[str]:
    async for place, answer in answers:
        line = f"data: {json.dumps(answer | {'index': place})}"
        yield f"id: {intact.digest(line.encode())}\n{line}\n\n"
    yield "data: [DONE]\n\n"


async def disconnected(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
