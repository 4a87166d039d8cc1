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
from collections.abc import Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar
from urllib.parse import urlsplit

import httpx

from astracli.errors import RunFailed
from astracli.hub import calls
from astracli.hub.calls import Call
from astracli.hub.types import NextBatch
from astracli.hub.wire import MAX_WAIT_S, unpack_answer
from astracli.process import intact
from astracli.process.http import Http, HttpError, Reply
from astracli.process.patience import GONE_S, Patience

RETRY_S = GONE_S
READ_TIMEOUT_S = 30.0 + MAX_WAIT_S
P = ParamSpec("P")
T = TypeVar("T")


class _Blocking(Generic[P, T]):
    """Makes a method of `HubClient` of an endpoint: it returns the answer."""

    def __init__(self, endpoint: Callable[P, Call[T]]):
        self._endpoint = endpoint

    def __get__(self, client: HubClient, owner: type) -> Callable[P, T]:
        return lambda *args, **named: client.send(self._endpoint(*args, **named))


class _Awaited(Generic[P, T]):
    """The same of `AsyncHubClient`: it returns an awaitable of the answer."""

    def __init__(self, endpoint: Callable[P, Call[T]]):
        self._endpoint = endpoint

    def __get__(self, client: AsyncHubClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]:
        return lambda *args, **named: client.send(self._endpoint(*args, **named))


def _settings(url: str, token: str) -> dict[str, Any]:
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=5.0)
    return {"base_url": url, "headers": {"Authorization": f"Bearer {token}"}, "timeout": timeout, "trust_env": False}


def _decode(call: Call[T], reply: Reply) -> T:
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


class HubClient:
    """Blocking; one connection pool, usable from several threads. A context manager."""

    lease = _Blocking(calls.lease)
    renew = _Blocking(calls.renew)
    give_back = _Blocking(calls.give_back)
    release = _Blocking(calls.release)
    put_group = _Blocking(calls.put_group)
    skip = _Blocking(calls.skip)
    batch = _Blocking(calls.batch)
    ack = _Blocking(calls.ack)
    announce = _Blocking(calls.announce)
    target = _Blocking(calls.target)
    slots = _Blocking(calls.slots)
    take_gpu_lease = _Blocking(calls.take_gpu_lease)
    give_gpu_lease = _Blocking(calls.give_gpu_lease)
    engine_state = _Blocking(calls.engine_state)
    eval_next = _Blocking(calls.eval_next)
    eval_engines = _Blocking(calls.eval_engines)
    eval_release = _Blocking(calls.eval_release)
    eval_done = _Blocking(calls.eval_done)
    metrics = _Blocking(calls.metrics)
    state = _Blocking(calls.state)

    def __init__(self, url: str, token: str):
        self._url = url
        self._token = token
        self._http = httpx.Client(**_settings(url, token), event_hooks=intact.hooks())

    def send(self, call: Call[T]) -> T:
        patience = _Patience(self._url)
        while True:
            try:
                return _decode(call, self._large(call) if call.kind is NextBatch else self._small(call))
            except (httpx.TransportError, http.client.HTTPException, OSError) as error:
                time.sleep(patience.next_pause(error))

    def _small(self, call: Call[Any]) -> Reply:
        reply = self._http.request(call.method, call.path, content=call.content)
        return Reply(reply.status_code, reply.content, reply.headers.get("content-type", ""))

    def _large(self, call: Call[Any]) -> Reply:
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


class AsyncHubClient:
    """For one asyncio loop; every method returns an awaitable. An async context manager."""

    lease = _Awaited(calls.lease)
    renew = _Awaited(calls.renew)
    give_back = _Awaited(calls.give_back)
    release = _Awaited(calls.release)
    put_group = _Awaited(calls.put_group)
    skip = _Awaited(calls.skip)
    batch = _Awaited(calls.batch)
    ack = _Awaited(calls.ack)
    announce = _Awaited(calls.announce)
    target = _Awaited(calls.target)
    slots = _Awaited(calls.slots)
    take_gpu_lease = _Awaited(calls.take_gpu_lease)
    give_gpu_lease = _Awaited(calls.give_gpu_lease)
    engine_state = _Awaited(calls.engine_state)
    eval_next = _Awaited(calls.eval_next)
    eval_engines = _Awaited(calls.eval_engines)
    eval_release = _Awaited(calls.eval_release)
    eval_done = _Awaited(calls.eval_done)
    metrics = _Awaited(calls.metrics)
    state = _Awaited(calls.state)

    def __init__(self, url: str, token: str):
        self._url = url
        self._http = Http(url, token)

    async def send(self, call: Call[T]) -> T:
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
