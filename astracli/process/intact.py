"""Bodies of HTTP between processes of a run carry a checksum: what was changed on its way is refused, never believed.

TCP's own checksum has 16 bits, and none on loopback. Both ends check where the other sends the header, so that engines
of others, which send none, are asked as before. A streamed answer has no header: each of its events may carry its own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import httpx
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-astra-xxh3"
REFUSED = "x-astra-damaged"
"""Header of the answer to a request whose body is not what was sent. It may be sent again."""
STATUS = 422
WORDS = "its body is not what was sent: it was changed on its way"


def digest(body: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(body)


def damaged(body: bytes, said: str | None) -> bool:
    """`said`: the header's value; None without one."""
    return said is not None and said != digest(body)


# ---- the client's end


def hooks() -> dict[str, list[Any]]:
    """`event_hooks` of an `httpx.Client`. A damaged request or answer raises httpx.RemoteProtocolError."""

    def answer(response: httpx.Response) -> None:
        if HEADER in response.headers or REFUSED in response.headers:
            response.read()
            _check(response)

    return {"request": [_sign], "response": [answer]}


def _sign(request: httpx.Request) -> None:
    request.headers[HEADER] = digest(request.content)


def _check(response: httpx.Response) -> None:
    import httpx

    what = f"{response.request.method} {response.request.url.path}"
    if REFUSED in response.headers:
        raise httpx.RemoteProtocolError(f"{what}: {WORDS}")
    if damaged(response.content, response.headers[HEADER]):
        raise httpx.RemoteProtocolError(f"the answer to {what}: {WORDS}")


# ---- the server's end


class Intact:
    """ASGI middleware: checks bodies of requests before the application sees them, and signs answers that are made in
    one piece."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = dict(scope["headers"]).get(HEADER.encode())
        body = b""
        if said is not None:
            parts, more = [], True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return  # the client is gone
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
            body = b"".join(parts)
            if damaged(body, said.decode("latin-1")):
                reason = json.dumps({"error": WORDS}).encode()
                headers = [(REFUSED.encode(), b"1"), (b"connection", b"close")]
                headers += [(b"content-type", b"application/json"), (b"content-length", str(len(reason)).encode())]
                await send({"type": "http.response.start", "status": STATUS, "headers": headers})
                await send({"type": "http.response.body", "body": reason})
                return
        given = said is None

        async def once() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        start: Message | None = None

        async def signed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    whole = (HEADER.encode(), digest(message.get("body", b"")).encode())
                    start = {**start, "headers": [*start.get("headers", ()), whole]}
                await send(start)
                start = None
            await send(message)

        await self._app(scope, once, signed)
