"""What the processes of an agent's host ask the hub goes through their agent, under its token.

They know one address, on loopback, and the token of their host. A request that does not reach the hub is sent again for
as long as its asker waits: all of them can be repeated (`hub/client.py`). So a network that is away for some seconds
ends nothing; the agent's lease decides when it was too long. Versions come from a cache of this host: one download.
"""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from astracli.errors import AstraError
from astracli.process.http import Http, HttpError
from astracli.process.server import TokenGuard
from astracli.weights.receive.download import Gone
from astracli.weights.receive.host_cache import HostCache

PAUSE_S = 0.2
ANSWER_S = 45.0
"""For one answer of the hub: its long polls take ten seconds."""


def relay_app(hub_url: str, token: str, host_token: str, cache: HostCache) -> ASGIApp:
    """`token`: the agent's, for the hub. `host_token`: what the processes of this host show."""
    hub = Http(hub_url, token)

    async def forward(request: Request) -> Response:
        body = await request.body()
        while not await request.is_disconnected():
            try:
                reply = await hub.request(request.method, request.url.path, body, timeout=ANSWER_S)
            except (HttpError, TimeoutError):
                await asyncio.sleep(PAUSE_S)
                continue
            return Response(reply.content, reply.status_code, media_type=reply.media_type or None)
        return Response(status_code=499)  # nobody waits

    async def listing(request: Request) -> Response:
        try:
            return JSONResponse(await asyncio.to_thread(cache.listing))
        except (AstraError, Gone) as error:
            return _unreachable(error)

    async def file(request: Request) -> Response:
        version, name = request.path_params["version"], request.path_params["file"]
        try:
            path = await asyncio.to_thread(cache.file, version, name)
        except AstraError as error:
            return _unreachable(error)
        if path is None:
            return JSONResponse({"error": f"version {version} has no file `{name}`"}, status_code=404)
        return FileResponse(path, media_type="application/octet-stream")

    routes = [
        Route("/weights", listing),
        Route("/weights/{version:int}/{file:str}", file),
        Route("/{path:path}", forward, methods=["POST", "PUT"]),
    ]
    refusal = JSONResponse({"error": "missing or wrong token of this host", "hint": None}, 401)
    return TokenGuard(Starlette(routes=routes), host_token, refusal)


def _unreachable(error: Exception) -> Response:
    """Askers try again after a 503."""
    return JSONResponse({"error": str(error)}, status_code=503)
