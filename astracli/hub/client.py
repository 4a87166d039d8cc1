"""Clients of the hub: `HubClient` (blocking) and `AsyncHubClient`, with the same methods and the same answers.

A hub that is gone is asked again for ten seconds, one that stands still for ten minutes (`process.patience`); every
call can be repeated without harm (a lease carries a request id, a group its lease, a batch and an acknowledgement
their step). Then, and for a refusal, RunFailed is raised.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from astracli.errors import RunFailed
from astracli.hub.slot_shares import User
from astracli.hub.types import (
    EngineState,
    GpuLeaseReply,
    Holders,
    HubState,
    Leases,
    NextBatch,
    NextEvaluation,
    PutStatus,
    SlotLimit,
    Target,
)
from astracli.hub.wire import MAX_WAIT_S, plain_json, unpack_answer
from astracli.process import intact
from astracli.process.http import Http, HttpError, Reply
from astracli.process.patience import GONE_S, Patience
from astracli.rl.types import Group, pack_group

RETRY_S = GONE_S
READ_TIMEOUT_S = 30.0 + MAX_WAIT_S


@dataclass(frozen=True)
class _Call:
    path: str
    content: bytes
    kind: Any
    """What the answer is."""
    method: str = "POST"


class _Calls:
    """Every endpoint once. `_send` returns the answer, or an awaitable of it in the async client.

    The answers that are named below are classes of `hub.types`.
    """

    def _send(self, call: _Call) -> Any:
        raise NotImplementedError

    def _post(self, path: str, kind: Any = None, **body: Any) -> Any:
        return self._send(_Call(path, plain_json(body), kind))

    def lease(self, worker: str, n: int, *, engine: str | None = None, wait_s: float = 0.0) -> Any:
        """-> Leases"""
        request = uuid.uuid4().hex
        return self._post("/lease", Leases, worker=worker, n=n, engine=engine, wait_s=wait_s, request=request)

    def renew(self, lease_ids: Iterable[int], worker: str | None = None) -> Any:
        """-> those of the leases that are lost"""
        return self._post("/lease/renew", list[int], lease_ids=list(lease_ids), worker=worker)

    def give_back(self, lease_ids: Iterable[int]) -> Any:
        """Leases that will not be filled return to the queue."""
        return self._post("/lease/return", lease_ids=list(lease_ids))

    def release(self, worker: str) -> Any:
        """Every lease that `worker` holds returns to the queue. -> how many"""
        return self._post("/lease/release", int, worker=worker)

    def put_group(self, group: Group) -> Any:
        """-> PutStatus"""
        return self._send(_Call("/group", pack_group(group), PutStatus, "PUT"))

    def skip(self, lease_id: int, reason: str) -> Any:
        return self._post("/skip", lease_id=lease_id, reason=reason)

    def batch(self, step: int, wait_s: float = MAX_WAIT_S) -> Any:
        """-> NextBatch"""
        return self._post("/batch", NextBatch, step=step, wait_s=wait_s)

    def ack(self, step: int, version: int, checkpoint_step: int | None = None) -> Any:
        return self._post("/ack", step=step, version=version, checkpoint_step=checkpoint_step)

    def announce(self, version: int, step: int) -> Any:
        """-> versions that must stay on disk"""
        return self._post("/announce", list[int], version=version, step=step)

    def target(self, engine: str, *, have: int | None = None, pinned: bool | None = None, wait_s: float = 0.0) -> Any:
        """-> Target; waits up to `wait_s` for another version than `have`, for the other of `pinned`, or for someone
        who wants the engine's GPU."""
        return self._post("/engine/target", Target, engine=engine, have=have, pinned=pinned, wait_s=wait_s)

    def slots(self, engine: str, user: User, wants: int, holds: int) -> Any:
        """-> SlotLimit"""
        return self._post("/engine/slots", SlotLimit, engine=engine, user=user, wants=wants, holds=holds)

    def take_gpu_lease(self, gpu_lease: str, who: str, wait_s: float = 0.0) -> Any:
        """-> GpuLeaseReply; waits up to `wait_s`, and keeps its place in the queue between two calls."""
        return self._post("/gpu_lease/take", GpuLeaseReply, gpu_lease=gpu_lease, who=who, wait_s=wait_s)

    def give_gpu_lease(self, gpu_lease: str, who: str) -> Any:
        return self._post("/gpu_lease/give", gpu_lease=gpu_lease, who=who)

    def engine_state(self, engine: str, version: int | None, state: EngineState) -> Any:
        return self._post("/engine/state", engine=engine, version=version, state=state)

    def eval_next(self, wait_s: float = MAX_WAIT_S, *, finishing: Iterable[int] = ()) -> Any:
        """-> NextEvaluation. `finishing`: versions whose results are being written, which are left out."""
        return self._post("/eval/next", NextEvaluation, wait_s=wait_s, finishing=list(finishing))

    def eval_engines(self, version: int, have: list[str] | None = None, wait_s: float = 0.0) -> Any:
        """-> Holders; waits up to `wait_s` for other engines than `have`."""
        return self._post("/eval/engines", Holders, version=version, have=have, wait_s=wait_s)

    def eval_release(self, step: int, version: int, engine: str) -> Any:
        """The engine has served its share of this evaluation, and every sample of it is on disk."""
        return self._post("/eval/release", step=step, version=version, engine=engine)

    def eval_done(self, step: int, version: int, results: Any) -> Any:
        return self._post("/eval/done", step=step, version=version, results=results)

    def metrics(self, records: list[dict[str, Any]]) -> Any:
        """Records {"step", "process", figures with their unit in the name}."""
        return self._post("/metrics", records=records)

    def state(self) -> Any:
        """-> HubState"""
        return self._post("/state", HubState)


def _settings(url: str, token: str) -> dict[str, Any]:
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=5.0)
    return {"base_url": url, "headers": {"Authorization": f"Bearer {token}"}, "timeout": timeout, "trust_env": False}


def _decode(call: _Call, reply: Reply) -> Any:
    if reply.status_code == 200:
        return unpack_answer(call.kind, reply.content, reply.media_type, f"{call.method} {call.path}")
    try:
        body = json.loads(reply.content)
        message, hint = str(body["error"]), body.get("hint")
    except (ValueError, KeyError, TypeError):
        message, hint = reply.text[:200], None
    raise RunFailed(f"the hub refused {call.method} {call.path} ({reply.status_code}): {message}", hint)


class _Patience:
    """How long to go on asking a hub that does not answer."""

    def __init__(self, url: str):
        self._url = url
        self._patience = Patience(RETRY_S)
        self._pause_s = 0.05

    def next_pause(self, error: Exception) -> float:
        """Seconds until the next try. Raises RunFailed when there is none."""
        waited = self._patience.exhausted(error, self._pause_s)
        if waited is not None:
            raise RunFailed(
                f"the hub at {self._url} did not answer for {waited:g} s: {error or type(error).__name__}",
                "its own log says why; `astra train --resume RUN_DIR` goes on from the last checkpoint",
            ) from error
        pause, self._pause_s = self._pause_s, min(1.0, self._pause_s * 2)
        return pause


class HubClient(_Calls):
    """Blocking; one connection pool, usable from several threads. A context manager."""

    def __init__(self, url: str, token: str):
        self._url = url
        self._token = token
        self._http = httpx.Client(**_settings(url, token), event_hooks=intact.hooks())

    def _send(self, call: _Call) -> Any:
        patience = _Patience(self._url)
        while True:
            try:
                return _decode(call, self._large(call) if call.kind is NextBatch else self._small(call))
            except (httpx.TransportError, http.client.HTTPException, OSError) as error:
                time.sleep(patience.next_pause(error))

    def _small(self, call: _Call) -> Reply:
        reply = self._http.request(call.method, call.path, content=call.content)
        return Reply(reply.status_code, reply.content, reply.headers.get("content-type", ""))

    def _large(self, call: _Call) -> Reply:
        """The same, for an answer of many megabytes: read in one piece, where httpx would take 64 kB at a time."""
        address = urlsplit(self._url)
        connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=READ_TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self._token}", intact.HEADER: intact.digest(call.content)}
            connection.request(call.method, call.path, call.content, headers)
            reply = connection.getresponse()
            body = reply.read()
            if intact.REFUSED in reply.headers or intact.damaged(body, reply.headers.get(intact.HEADER)):
                raise http.client.HTTPException(f"{call.method} {call.path} or its answer: {intact.WORDS}")
            return Reply(reply.status, body, reply.headers.get("content-type", ""))
        finally:
            connection.close()

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncHubClient(_Calls):
    """For one asyncio loop; every method returns an awaitable. An async context manager."""

    def __init__(self, url: str, token: str):
        self._url = url
        self._http = Http(url, token)

    async def _send(self, call: _Call) -> Any:
        patience = _Patience(self._url)
        while True:
            try:
                reply = await self._http.request(call.method, call.path, call.content, timeout=READ_TIMEOUT_S)
                return _decode(call, reply)
            except (HttpError, TimeoutError) as error:
                await asyncio.sleep(patience.next_pause(error))

    async def __aenter__(self) -> AsyncHubClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
