"""The hub over HTTP: JSON for control, msgpack for groups and batches, long polls that say what they wait for.

Every request carries the run's token. A bad body is 400, a step out of order 409, each with {"error": words}. The hub
process is the only writer of metrics.jsonl. `serve` runs the app in a thread of the supervisor, on a socket it bound.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from astracli.errors import AstraError, disk_full
from astracli.hub.parse import BadBody, field, lease_ids, read_json, wait_s
from astracli.hub.server import ServerThread, serve
from astracli.hub.store import HubStore
from astracli.hub.wire import MAX_WAIT_S, finite

__all__ = ["ServerThread", "build_app", "serve"]

Endpoint = Callable[[Request], Awaitable[Response]]
RECHECK_S = 1.0
"""A waiting request looks again this often even when nothing changed: leases expire by time alone."""


class TokenGuard:
    """ASGI middleware: 401 for a request without `Authorization: Bearer TOKEN`."""

    def __init__(self, app: ASGIApp, token: str):
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                await _error(401, "missing or wrong token")(scope, receive, send)
                return
        with suppress(ClientDisconnect):  # a worker that ends in the middle of a request is no error of the hub
            await self._app(scope, receive, send)


def _error(status: int, message: str, hint: str | None = None) -> JSONResponse:
    return JSONResponse({"error": message, "hint": hint}, status)


async def _on_bad_body(request: Request, error: Exception) -> Response:
    return _error(400, f"{request.method} {request.url.path}: {error}")


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, AstraError)
    return _error(409, error.message, error.hint)


async def _on_failed_write(request: Request, error: Exception) -> Response:
    """A full disk in one line, instead of the traceback that anything else gets."""
    full = disk_full(error)
    if full is None:
        raise error
    return _error(500, full.message, full.hint)


class MetricsFile:
    """Appends records to metrics.jsonl, one JSON object a line, flushed: {"time", "step", "process", ...}.

    Figures that are not finite become null: JSON has no word for them.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._lock = threading.Lock()

    def append(self, records: list[Any]) -> None:
        """Raises ValueError, and writes nothing, when a record is no object."""
        if not all(isinstance(record, dict) for record in records):
            raise BadBody("`records` holds something that is no object")
        lines = [json.dumps(finite({"time": time.time()} | record), allow_nan=False) + "\n" for record in records]
        if self._path is None:
            return
        with self._lock, self._path.open("a") as file:
            file.write("".join(lines))


class _Pulse:
    """Wakes every waiting request when the store changed, from whichever thread it did."""

    def __init__(self, store: HubStore):
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        store.subscribe(self._on_change)

    def _on_change(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._beat)

    def _beat(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(
        self,
        request: Request,
        ask: Callable[[], dict[str, Any]],
        ready: Callable[[dict[str, Any]], bool],
        longest_s: float,
    ) -> dict[str, Any]:
        """`ask()` again at every change until it is `ready`, `longest_s` has passed or the client is gone."""
        self._loop = asyncio.get_running_loop()
        end = time.monotonic() + longest_s
        while True:
            event = self._event
            reply = ask()
            left = end - time.monotonic()
            if ready(reply) or left <= 0:
                return reply
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), min(left, RECHECK_S))
            if await request.is_disconnected():
                return reply


class _Hub:
    """The endpoints. Each parses, calls the store once and answers."""

    def __init__(self, store: HubStore, metrics_path: Path | None, on_status: Callable[[dict[str, Any]], None] | None):
        self._store = store
        self._metrics = MetricsFile(metrics_path)
        self._on_status = on_status
        self._statuses: dict[str, dict[str, Any]] = {}
        self._pulse = _Pulse(store)

    async def lease(self, request: Request) -> Response:
        body = await read_json(request)
        worker, n = field(body, "worker", str), field(body, "max", int)
        engine, unique = field(body, "engine", str, None), field(body, "request", str, None)
        reply = await self._pulse.until(
            request,
            lambda: self._store.lease(worker, n, engine=engine, request=unique),
            lambda r: bool(r["leases"] or r["stop"]),
            wait_s(body),
        )
        return JSONResponse(reply)

    async def renew(self, request: Request) -> Response:
        body = await read_json(request)
        return JSONResponse({"lost": self._store.renew(lease_ids(body), field(body, "worker", str, None))})

    async def give_back(self, request: Request) -> Response:
        self._store.give_back(lease_ids(await read_json(request)))
        return JSONResponse({})

    async def release(self, request: Request) -> Response:
        body = await read_json(request)
        return JSONResponse({"released": self._store.release_worker(field(body, "worker", str))})

    async def put_group(self, request: Request) -> Response:
        blob = await request.body()
        try:
            return JSONResponse({"status": self._store.put(blob)})
        except ValueError as error:
            raise BadBody(str(error)) from None

    async def skip(self, request: Request) -> Response:
        body = await read_json(request)
        self._store.skip(field(body, "lease_id", int), field(body, "reason", str))
        return JSONResponse({})

    async def batch(self, request: Request) -> Response:
        body = await read_json(request)
        step = field(body, "step", int)
        reply = await self._pulse.until(request, lambda: self._store.batch(step), lambda r: "groups" in r, wait_s(body))
        return Response(msgpack.packb(reply), media_type="application/msgpack")

    async def ack(self, request: Request) -> Response:
        body = await read_json(request)
        checkpoint_step = field(body, "checkpoint_step", int, None)
        self._store.ack(field(body, "step", int), field(body, "version", int), checkpoint_step)
        return JSONResponse({})

    async def announce(self, request: Request) -> Response:
        body = await read_json(request)
        return JSONResponse(self._store.announce(field(body, "version", int), field(body, "step", int)))

    async def target(self, request: Request) -> Response:
        name, query = request.path_params["name"], request.query_params
        try:
            have, longest = int(query.get("have", "-1")), min(MAX_WAIT_S, float(query.get("wait_s", "0")))
            pinned = bool(int(query["pinned"])) if "pinned" in query else None
        except ValueError as error:
            raise BadBody(str(error)) from None

        def is_news(reply: dict[str, Any]) -> bool:
            moved = reply["version"] is not None and reply["version"] != have
            return reply["stop"] or reply.get("wanted") or moved or pinned not in (None, reply["pinned"])

        return JSONResponse(await self._pulse.until(request, lambda: self._store.target(name), is_news, longest))

    async def engine_state(self, request: Request) -> Response:
        body = await read_json(request)
        info = {key: value for key, value in body.items() if key not in ("version", "state", "engine")}
        version, state = field(body, "version", int, None), field(body, "state", str)
        if state not in ("ready", "updating", "down") or (state == "ready" and version is None):
            raise BadBody(f"`state` = {state!r} at version {version} is none of ready, updating, down")
        self._store.engine_state(request.path_params["name"], version, state, **info)
        return JSONResponse({})

    async def take_gpu_lease(self, request: Request) -> Response:
        body = await read_json(request)
        gpu_lease, who = field(body, "gpu_lease", str), field(body, "who", str)
        try:
            reply = await self._pulse.until(
                request,
                lambda: self._store.take_gpu_lease(gpu_lease, who),
                lambda r: bool(r["held"] or r["stop"]),
                wait_s(body),
            )
        except ValueError as error:
            raise BadBody(str(error)) from None
        return JSONResponse(reply)

    async def give_gpu_lease(self, request: Request) -> Response:
        body = await read_json(request)
        self._store.give_gpu_lease(field(body, "gpu_lease", str), field(body, "who", str))
        return JSONResponse({})

    async def eval_next(self, request: Request) -> Response:
        body = await read_json(request)
        finishing = field(body, "finishing", list, [])
        reply = await self._pulse.until(
            request,
            lambda: self._store.eval_next(finishing),
            lambda r: "step" in r or bool(r.get("stop")),
            wait_s(body),
        )
        return JSONResponse(reply)

    async def eval_engines(self, request: Request) -> Response:
        body = await read_json(request)
        version, have = field(body, "version", int), field(body, "have", list, None)
        reply = await self._pulse.until(
            request,
            lambda: self._store.eval_engines(version),
            lambda r: r["stop"] or r["engines"] != have,
            wait_s(body),
        )
        return JSONResponse(reply)

    async def eval_release(self, request: Request) -> Response:
        body = await read_json(request)
        self._store.eval_release(field(body, "step", int), field(body, "version", int), field(body, "engine", str))
        return JSONResponse({})

    async def eval_done(self, request: Request) -> Response:
        body = await read_json(request)
        self._store.eval_done(field(body, "step", int), field(body, "version", int), field(body, "results", object))
        return JSONResponse({})

    async def status(self, request: Request) -> Response:
        body = await read_json(request)
        name = field(body, "name", str)
        self._statuses[name] = body | {"heard": time.monotonic()}
        if self._on_status is not None:
            self._on_status(body)
        return JSONResponse({"stop": self._store.stop_requested})

    async def metrics(self, request: Request) -> Response:
        self._metrics.append(field(await read_json(request), "records", list))
        return JSONResponse({})

    async def state(self, request: Request) -> Response:
        now = time.monotonic()
        statuses = {
            name: {key: value for key, value in report.items() if key != "heard"} | {"age_s": now - report["heard"]}
            for name, report in self._statuses.items()
        }
        return JSONResponse(finite(self._store.state() | {"statuses": statuses}))


def build_app(
    store: HubStore,
    token: str,
    *,
    weights_app: ASGIApp | None = None,
    metrics_path: Path | None = None,
    on_status: Callable[[dict[str, Any]], None] | None = None,
) -> ASGIApp:
    """The hub's ASGI app. `weights_app` serves `/weights`; `on_status` sees every heartbeat, in the server's thread."""
    hub = _Hub(store, metrics_path, on_status)
    posts: dict[str, Endpoint] = {
        "/lease": hub.lease,
        "/lease/renew": hub.renew,
        "/lease/return": hub.give_back,
        "/lease/release": hub.release,
        "/skip": hub.skip,
        "/batch": hub.batch,
        "/ack": hub.ack,
        "/announce": hub.announce,
        "/engines/{name}/state": hub.engine_state,
        "/gpu_lease/take": hub.take_gpu_lease,
        "/gpu_lease/give": hub.give_gpu_lease,
        "/eval/next": hub.eval_next,
        "/eval/engines": hub.eval_engines,
        "/eval/release": hub.eval_release,
        "/eval/done": hub.eval_done,
        "/status": hub.status,
        "/metrics": hub.metrics,
    }
    routes: list[BaseRoute] = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    routes.append(Route("/group", hub.put_group, methods=["PUT"]))
    routes.append(Route("/engines/{name}/target", hub.target, methods=["GET"]))
    routes.append(Route("/state", hub.state, methods=["GET"]))
    if weights_app is not None:
        routes.append(Mount("/weights", weights_app))
    known: dict[Any, Any] = {BadBody: _on_bad_body, AstraError: _on_refusal}
    known |= dict.fromkeys((OSError, sqlite3.OperationalError), _on_failed_write)
    app = Starlette(routes=routes, exception_handlers=known)
    return TokenGuard(app, token)
