"""What the processes of an agent's host ask the hub goes through their agent, under its token.

They know one address, on loopback, and the token of their host. A request that does not reach the hub is sent again for
as long as its asker waits: all of them can be repeated (`hub/client.py`). So a network that is away for some seconds
ends nothing; the agent's lease decides when it was too long. Versions come from a cache of this host: one download.
Heartbeats stay here: the agent tells them together, in its report.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

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


class Beats:
    """The newest heartbeat of each process, until the hub has it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: dict[str, dict[str, Any]] = {}
        self._states: dict[str, Any] = {}
        self.urgent = threading.Event()
        """A state has changed, or there is a warning: it should not wait for the next report."""
        self.over = threading.Event()
        """The agent ends: nobody asks the hub any more."""
        self.stop = False
        """The run asks its processes to finish, as the hub said last."""

    def beat(self, body: dict[str, Any]) -> None:
        with self._lock:
            name, earlier = str(body.get("name")), self._new.get(str(body.get("name")), {})
            if warnings := [*earlier.get("warnings", ()), *(body.get("warnings") or ())]:
                body = body | {"warnings": warnings}
            self._new[name] = body
            if warnings or body.get("state") != self._states.get(name):
                self._states[name] = body.get("state")
                self.urgent.set()

    def take(self) -> list[dict[str, Any]]:
        with self._lock:
            self.urgent.clear()
            taken, self._new = self._new, {}
            return list(taken.values())

    def put_back(self, taken: list[dict[str, Any]]) -> None:
        """The hub did not get these."""
        with self._lock:
            newer, self._new = self._new, {str(body.get("name")): body for body in taken}
        for body in newer.values():
            self.beat(body)


def relay_app(hub_url: str, token: str, host_token: str, cache: HostCache, beats: Beats) -> ASGIApp:
    """`token`: the agent's, for the hub. `host_token`: what the processes of this host show."""
    hub = Http(hub_url, token)

    async def forward(request: Request) -> Response:
        body = await request.body()
        while not (beats.over.is_set() or await request.is_disconnected()):
            try:
                reply = await hub.request(request.method, request.url.path, body, timeout=ANSWER_S)
            except (HttpError, TimeoutError):
                await asyncio.sleep(PAUSE_S)
                continue
            return Response(reply.content, reply.status_code, media_type=reply.media_type or None)
        return Response(status_code=499)  # nobody waits

    async def status(request: Request) -> Response:
        try:
            body = json.loads(await request.body(), parse_constant=_no_number)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return JSONResponse({"error": "no heartbeat", "hint": None}, status_code=400)
        beats.beat(body)
        return JSONResponse({"stop": beats.stop})

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
        Route("/status", status, methods=["POST"]),
        Route("/weights", listing),
        Route("/weights/{version:int}/{file:str}", file),
        Route("/{path:path}", forward, methods=["POST", "PUT"]),
    ]
    refusal = JSONResponse({"error": "missing or wrong token of this host", "hint": None}, 401)
    return TokenGuard(Starlette(routes=routes), host_token, refusal)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _unreachable(error: Exception) -> Response:
    """Askers try again after a 503."""
    return JSONResponse({"error": str(error)}, status_code=503)
