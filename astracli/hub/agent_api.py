"""The hub's routes for agents, and what an agent's token is good for.

POST /agent/join      with the ticket: facts, versions and address of its host in, a token of its own out
POST /agent/orders    what it is to do, a long poll
POST /agent/report    what its processes do, their heartbeats, and what they wrote
POST /agent/leave     it ends
GET  /agent/link      made-up bytes, by which an agent measures how many a second reach its host
GET  /agent/input/N   a file that processes read before they start: of the model, or problems

An agent passes on what its processes ask the hub, under its own token: leases, groups, versions. It may not ask for
batches or announce versions.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astracli.hub.agent_types import ProcessNews
from astracli.hub.agents import AGENT, TICKET, Agents
from astracli.hub.polls import Poll
from astracli.hub.types import BadRequest
from astracli.hub.wire import called_with_body, pack_answer
from astracli.process.server import CLOSE, HOLDER

FOR_PROCESSES = (
    "/lease", "/lease/renew", "/lease/return", "/lease/release", "/skip", "/group", "/engine/target", "/engine/slots",
    "/engine/state", "/metrics",
)  # fmt: skip
"""What the processes of an agent's host ask."""
LARGEST = 1 << 28
"""Bytes of the largest request that an agent may send: a group of long completions is a few megabytes."""
LINK_BYTES, LINK_PIECE = 64 << 20, 256 << 10
"""What an agent gets at most to measure its link, and in one piece."""
LARGEST_OWN = 8 << 20
"""Of one that it makes itself: facts, reports."""


def may(holder: str | None, path: str) -> bool:
    """Whether the holder of a token may ask for this path. None: the run's own processes, which may all but speak for
    an agent."""
    if holder is None:
        return not path.startswith("/agent/")
    if holder.startswith(TICKET):
        return path in ("/agent/join", "/agent/link")
    return path in FOR_PROCESSES or (path.startswith(("/agent/", "/weights")) and path != "/agent/join")


class Limited:
    """ASGI middleware: each token opens its own routes, and an agent's requests have a largest size."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        holder, path = scope.get(HOLDER), scope["path"]
        if not may(holder, path):
            await _refuse(403, "this token is not for that")(scope, receive, send)
            return
        if holder is None:
            await self._app(scope, receive, send)
            return
        limit, seen = LARGEST_OWN if path.startswith("/agent/") else LARGEST, 0
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(413, f"the request is larger than {limit} bytes")(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                return {"type": "http.disconnect"}
            return message

        await self._app(scope, counted, send)


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message, "hint": None}, status, {"connection": CLOSE})


Answer = Callable[[Request, Poll[Any]], Awaitable[Any]]


def routes(
    agents: Agents,
    wait: Answer,
    inputs: Callable[[str], Path | None],
    status: Callable[..., Any],
    stop: Callable[[], bool],
) -> list[Route]:
    """`wait`: how a long poll is answered. `inputs`: the file of a name, None for any other. `status`: what is done
    with a heartbeat. `stop`: whether processes are asked to finish."""
    beat = called_with_body(status)

    def join(
        ident: str,
        address: str,
        ports: list[int],
        versions: dict[str, str],
        facts: dict[str, Any],
        name: str | None = None,
    ) -> dict[str, Any]:
        said = {"ident": ident, "address": address, "ports": ports, "versions": versions, "facts": facts}
        return said | {"name": name}

    def orders(done: int, wait_s: float = 0.0) -> dict[str, Any]:
        return {"done": done, "wait_s": wait_s}

    def report(
        processes: list[dict[str, Any]],
        usage: dict[str, list[int]],
        memory: dict[str, Any],
        beats: list[dict[str, Any]],
    ) -> dict[str, Any]:
        pairs = {name: (int(pair[0]), int(pair[1])) for name, pair in usage.items() if len(pair) == 2}
        try:
            news = TypeAdapter(list[ProcessNews]).validate_python(processes)
        except ValidationError as error:
            raise BadRequest(f"no news of processes: {error.errors(include_url=False)[0]['msg']}") from None
        return {"processes": news, "usage": pairs, "memory": memory, "beats": beats}

    def leave(reason: str) -> dict[str, Any]:
        return {"reason": reason}

    def host(request: Request) -> str:
        return str(request.scope[HOLDER]).removeprefix(TICKET).removeprefix(AGENT)

    def told(me: str, beats: list[dict[str, Any]], **news: Any) -> dict[str, bool]:
        """Heartbeats first: the last one of a process that has ended says why."""
        for body in beats:
            beat(json.dumps(body).encode())
        agents.report(me, **news)
        return {"stop": stop()}

    def asks(request: Request, ticket: str) -> Callable[[dict[str, Any]], Any]:
        me = host(request)
        return {
            "/agent/join": lambda said: agents.join(me, ticket, **said),
            "/agent/orders": lambda said: Poll(
                said["wait_s"], lambda: agents.orders(me, said["done"]), lambda reply: bool(reply.orders)
            ),
            "/agent/report": lambda said: told(me, **said),
            "/agent/leave": lambda said: agents.leave(me, **said),
        }[request.url.path]

    def route(path: str, read: Callable[..., dict[str, Any]]) -> Route:
        checked = called_with_body(read)

        async def answer(request: Request) -> Response:
            ticket = request.headers.get("authorization", "").removeprefix("Bearer ")
            reply = asks(request, ticket)(checked(await request.body()))
            body, media_type = pack_answer(await wait(request, reply) if isinstance(reply, Poll) else reply)
            return Response(body, media_type=media_type)

        return Route(path, answer, methods=["POST"])

    async def file(request: Request) -> Response:
        path = inputs(request.path_params["name"])
        return _refuse(404, "there is no such file") if path is None else FileResponse(path)

    async def link(request: Request) -> Response:
        asked = request.query_params.get("bytes", "")
        size = min(int(asked), LINK_BYTES) if asked.isascii() and asked.isdigit() and len(asked) < 12 else 0

        async def parts() -> AsyncIterator[bytes]:
            piece = secrets.token_bytes(LINK_PIECE)  # nothing in between can make it smaller
            for at in range(0, size, LINK_PIECE):
                yield piece[: size - at]

        return StreamingResponse(parts(), media_type="application/octet-stream", headers={"content-length": str(size)})

    named: dict[str, Callable[..., dict[str, Any]]] = {
        "/agent/join": join,
        "/agent/orders": orders,
        "/agent/report": report,
        "/agent/leave": leave,
    }
    return [
        *(route(path, read) for path, read in named.items()),
        Route("/agent/input/{name}", file),
        Route("/agent/link", link),
    ]
