"""The hub over HTTP: JSON for control, msgpack for groups and batches, long polls that say what they wait for.

Every request carries the run's token. A bad body is 400, a step out of order 409, each with {"error": words}. The hub
process is the only writer of metrics.jsonl.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from astracli.errors import AstraError, disk_failed
from astracli.hub import agent_api
from astracli.hub.agents import Agents
from astracli.hub.polls import Poll
from astracli.hub.store import HubStore
from astracli.hub.types import BadRequest, GpuLeaseReply, Holders, Leases, NextBatch, NextEvaluation, Target
from astracli.hub.wire import MAX_WAIT_S, called_with_body, pack_answer
from astracli.process.server import TokenGuard
from astracli.runs import metrics

T = TypeVar("T")
ASK_S = 5e-5
"""For every request that waits, between two times that all are woken: an engine's target takes about half of that."""
RECHECK_S = 1.0
"""A waiting request looks again this often even when nothing changed: leases expire by time alone."""


def _error(status: int, message: str, hint: str | None = None) -> JSONResponse:
    return JSONResponse({"error": message, "hint": hint}, status)


async def _on_error(request: Request, error: Exception) -> Response:
    """A full disk is one line, too; anything else gets a traceback."""
    if isinstance(error, BadRequest):
        return _error(400, f"{request.method} {request.url.path}: {error}")
    if isinstance(error, AstraError):
        return _error(409, error.message, error.hint)
    full = disk_failed(error)
    if full is None:
        raise error
    return _error(500, full.message, full.hint)


class _Pulse:
    """Wakes every waiting request when the store changed, from whichever thread it did. Each of them then asks again,
    so that changes close together wake them once, and the more wait the longer they are collected."""

    def __init__(self, store: HubStore | Agents):
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._next = 0.0
        """Time of the loop before which nobody is woken again."""
        self._planned = False
        store.subscribe(self._on_change)

    def _on_change(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._plan)

    def _plan(self) -> None:
        assert self._loop is not None
        if not self._planned:
            self._planned = True
            self._loop.call_at(self._next, self._beat)

    def _beat(self) -> None:
        assert self._loop is not None
        self._planned = False
        self._next = self._loop.time() + ASK_S * self._waiting
        self._event.set()
        self._event = asyncio.Event()

    async def answer(self, request: Request, poll: Poll[T]) -> T:
        """The poll's last answer; also when the client is gone."""
        self._loop = asyncio.get_running_loop()
        end = time.monotonic() + min(poll.wait_s, MAX_WAIT_S)
        while True:
            event = self._event
            reply = poll.ask()
            left = end - time.monotonic()
            if poll.ready(reply) or left <= 0:
                return reply
            self._waiting += 1
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), min(left, RECHECK_S))
            finally:
                self._waiting -= 1
            if await request.is_disconnected():
                return reply


@dataclass(frozen=True)
class _Hub:
    """What the store does not answer by itself: polls, heartbeats, metrics. Arguments are the keys of a body."""

    _store: HubStore
    _metrics_path: Path | None
    _on_status: Callable[[dict[str, Any]], None] | None

    def lease(
        self, worker: str, n: int, engine: str | None = None, request: str | None = None, wait_s: float = 0.0
    ) -> Poll[Leases]:
        return Poll(
            wait_s,
            lambda: self._store.lease(worker, n, engine=engine, request=request),
            lambda r: bool(r.leases) or r.stop,
        )

    def batch(self, step: int, wait_s: float = 0.0) -> Poll[NextBatch]:
        return Poll(wait_s, lambda: self._store.batch(step), lambda r: r.batch is not None)

    def target(
        self, engine: str, have: int | None = None, pinned: bool | None = None, wait_s: float = 0.0
    ) -> Poll[Target]:
        def is_news(reply: Target) -> bool:
            return reply.stop or reply.wanted or reply.version not in (None, have) or pinned not in (None, reply.pinned)

        return Poll(wait_s, lambda: self._store.target(engine), is_news)

    def take_gpu_lease(self, gpu_lease: str, who: str, wait_s: float = 0.0) -> Poll[GpuLeaseReply]:
        return Poll(wait_s, lambda: self._store.take_gpu_lease(gpu_lease, who), lambda r: r.held or r.stop)

    def eval_next(self, finishing: list[int], wait_s: float = 0.0) -> Poll[NextEvaluation]:
        return Poll(wait_s, lambda: self._store.eval_next(finishing), lambda r: r.evaluation is not None or r.stop)

    def eval_engines(self, version: int, have: list[str] | None = None, wait_s: float = 0.0) -> Poll[Holders]:
        return Poll(wait_s, lambda: self._store.eval_engines(version), lambda r: r.stop or r.engines != have)

    def status(
        self,
        name: str,
        pid: int,
        state: str,
        waiting: str | None,
        progress: dict[str, Any],
        error: str | None = None,
        warnings: list[str] | None = None,
    ) -> dict[str, bool]:
        if self._on_status is not None:
            beat = {"name": name, "pid": pid, "state": state, "waiting": waiting, "progress": progress}
            more = {"error": error, "warnings": warnings}
            self._on_status(beat | {key: value for key, value in more.items() if value is not None})
        return {"stop": self._store.stop_requested, "save": self._store.save_requested}

    def metrics(self, records: list[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl, one JSON object each: {"time", "step", "process", ...}. A step is a whole number."""
        for record in records:
            if not metrics.readable(record):
                raise BadRequest(f"`step` = {record['step']!r:.40}: of a record it is a whole number")
        if self._metrics_path is not None:
            metrics.append(self._metrics_path, records)


def build_app(
    store: HubStore,
    token: str,
    *,
    weights_app: ASGIApp | None = None,
    metrics_path: Path | None = None,
    on_status: Callable[[dict[str, Any]], None] | None = None,
    agents: Agents | None = None,
    inputs: Callable[[str], Path | None] = lambda name: None,
) -> ASGIApp:
    """The hub's ASGI app. `weights_app` serves `/weights`; `on_status` sees every heartbeat, in the server's thread.
    `agents`: of a run on several hosts; `inputs`: the file that an agent may fetch under a name."""
    hub, pulse = _Hub(store, metrics_path, on_status), _Pulse(store)
    calls: dict[str, Callable[..., Any]] = {
        "/lease": hub.lease,
        "/lease/renew": store.renew,
        "/lease/return": store.give_back,
        "/lease/release": store.release_worker,
        "/skip": store.skip,
        "/batch": hub.batch,
        "/ack": store.ack,
        "/announce": store.announce,
        "/engine/target": hub.target,
        "/engine/slots": store.slots,
        "/engine/state": store.engine_state,
        "/gpu_lease/take": hub.take_gpu_lease,
        "/gpu_lease/give": store.give_gpu_lease,
        "/eval/next": hub.eval_next,
        "/eval/engines": hub.eval_engines,
        "/eval/release": store.eval_release,
        "/eval/done": store.eval_done,
        "/status": hub.status,
        "/metrics": hub.metrics,
        "/state": store.state,
    }

    def route(path: str, call: Callable[[bytes], Any], method: str = "POST") -> Route:
        async def answer(request: Request) -> Response:
            reply = call(await request.body())
            body, media_type = pack_answer(await pulse.answer(request, reply) if isinstance(reply, Poll) else reply)
            return Response(body, media_type=media_type)

        return Route(path, answer, methods=[method])

    routes: list[BaseRoute] = [route(path, called_with_body(call)) for path, call in calls.items()]
    routes.append(route("/group", store.put, "PUT"))
    if weights_app is not None:
        routes.append(Mount("/weights", weights_app))
    if agents is not None:
        routes += agent_api.routes(agents, _Pulse(agents).answer, inputs, hub.status, lambda: store.stop_requested)
    known: Any = dict.fromkeys((BadRequest, AstraError, OSError, sqlite3.OperationalError), _on_error)
    app: ASGIApp = Starlette(routes=routes, exception_handlers=known)
    refusal = _error(401, "missing or wrong token")
    if agents is None:
        return TokenGuard(app, token, refusal)
    return TokenGuard(app, token, refusal, agents.holder, agent_api.Limited)
