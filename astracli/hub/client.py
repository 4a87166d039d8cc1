"""Clients of the hub: `HubClient` (blocking) and `AsyncHubClient`, with the same methods and the same answers.

A hub that does not answer is asked again for ten seconds; every call can be repeated without harm (a lease carries a
request id, a group its lease, a batch and an acknowledgement their step). Then, and for a refusal, RunFailed is raised.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgpack

from astracli.errors import RunFailed
from astracli.hub.wire import MAX_WAIT_S, finite
from astracli.rl.types import Group, pack_group

RETRY_S = 10.0
READ_TIMEOUT_S = 30.0 + MAX_WAIT_S


@dataclass(frozen=True)
class _Call:
    method: str
    path: str
    content: bytes | None
    content_type: str


class _Calls:
    """Every endpoint once. `_send` answers the call's decoded body, or an awaitable of it in the async client."""

    def _send(self, call: _Call) -> Any:
        raise NotImplementedError

    def _post(self, path: str, **body: Any) -> Any:
        content = json.dumps({k: finite(v) for k, v in body.items() if v is not None}, allow_nan=False).encode()
        return self._send(_Call("POST", path, content, "application/json"))

    def lease(self, worker: str, n: int, *, engine: str | None = None, wait_s: float = 0.0) -> Any:
        """-> {"leases": [{"lease_id", "prompt_index"}], "wait": reason or None, "stop": bool}"""
        return self._post("/lease", worker=worker, max=n, engine=engine, wait_s=wait_s, request=uuid.uuid4().hex)

    def renew(self, lease_ids: Iterable[int], worker: str | None = None) -> Any:
        """-> {"lost": [lease ids]}"""
        return self._post("/lease/renew", lease_ids=list(lease_ids), worker=worker)

    def give_back(self, lease_ids: Iterable[int]) -> Any:
        """Leases that will not be filled return to the queue. -> {}"""
        return self._post("/lease/return", lease_ids=list(lease_ids))

    def release(self, worker: str) -> Any:
        """Every lease that `worker` holds returns to the queue. -> {"released": int}"""
        return self._post("/lease/release", worker=worker)

    def put_group(self, group: Group) -> Any:
        """-> {"status": "accepted" | "dropped" | "duplicate" | "unknown_lease" | "stale"}"""
        return self._send(_Call("PUT", "/group", pack_group(group), "application/msgpack"))

    def skip(self, lease_id: int, reason: str) -> Any:
        """-> {}"""
        return self._post("/skip", lease_id=lease_id, reason=reason)

    def batch(self, step: int, wait_s: float = MAX_WAIT_S) -> Any:
        """-> {"step", "groups": [packed group], "stats": {...}} or {"wait": reason}"""
        return self._post("/batch", step=step, wait_s=wait_s)

    def ack(self, step: int, version: int, checkpoint_step: int | None = None) -> Any:
        """-> {}"""
        return self._post("/ack", step=step, version=version, checkpoint_step=checkpoint_step)

    def announce(self, version: int, step: int) -> Any:
        """-> {"pinned": [versions that must stay on disk]}"""
        return self._post("/announce", version=version, step=step)

    def target(self, engine: str, *, have: int | None = None, pinned: bool | None = None, wait_s: float = 0.0) -> Any:
        """-> {"version": int or None, "pinned": bool, "stop": bool}; waits up to `wait_s` for another version than
        `have`, or for the other of `pinned`: whether an evaluation holds the engine at that version.
        Of an engine with a GPU lease also "wanted": someone waits for it, which ends the wait, too. Of one
        that was lost, and not reported since, "down"."""
        query = f"wait_s={wait_s}" + ("" if have is None else f"&have={have}")
        query += "" if pinned is None else f"&pinned={int(pinned)}"
        return self._send(_Call("GET", f"/engines/{engine}/target?{query}", None, "application/json"))

    def take_gpu_lease(self, gpu_lease: str, who: str, wait_s: float = 0.0) -> Any:
        """-> {"held": bool, "stop": bool}; waits up to `wait_s`, and keeps its place in the queue between two calls."""
        return self._post("/gpu_lease/take", gpu_lease=gpu_lease, who=who, wait_s=wait_s)

    def give_gpu_lease(self, gpu_lease: str, who: str) -> Any:
        """-> {}"""
        return self._post("/gpu_lease/give", gpu_lease=gpu_lease, who=who)

    def engine_state(self, engine: str, version: int | None, state: str, **info: Any) -> Any:
        """state: ready | updating | down. -> {}"""
        return self._post(f"/engines/{engine}/state", version=version, state=state, **info)

    def eval_next(self, wait_s: float = MAX_WAIT_S, *, finishing: Iterable[int] = ()) -> Any:
        """-> {"step", "version", "due_step", "served": every sample is on disk} or {"wait": reason, "stop": bool}.
        `finishing`: versions whose results are being written, which are left out."""
        return self._post("/eval/next", wait_s=wait_s, finishing=list(finishing))

    def eval_engines(self, version: int, have: list[str] | None = None, wait_s: float = 0.0) -> Any:
        """-> {"engines": names of those that can be asked now, "stop": bool}; waits up to `wait_s` for other names than
        `have`."""
        return self._post("/eval/engines", version=version, have=have, wait_s=wait_s)

    def eval_release(self, step: int, version: int, engine: str) -> Any:
        """The engine has served its share of this evaluation, and every sample of it is on disk. -> {}"""
        return self._post("/eval/release", step=step, version=version, engine=engine)

    def eval_done(self, step: int, version: int, results: Any) -> Any:
        """-> {}"""
        return self._post("/eval/done", step=step, version=version, results=results)

    def status(self, document: dict[str, Any]) -> Any:
        """A heartbeat: {"name", "pid", "state", "waiting", "progress"}. -> {"stop": bool}"""
        return self._post("/status", **document)

    def metrics(self, records: list[dict[str, Any]]) -> Any:
        """Records {"step", "process", figures with their unit in the name}. -> {}"""
        return self._post("/metrics", records=records)

    def state(self) -> Any:
        """Everything that the terminal shows."""
        return self._send(_Call("GET", "/state", None, "application/json"))


def _settings(url: str, token: str) -> dict[str, Any]:
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=5.0)
    return {"base_url": url, "headers": {"Authorization": f"Bearer {token}"}, "timeout": timeout, "trust_env": False}


def _decode(call: _Call, response: httpx.Response) -> Any:
    if response.status_code == 200:
        kind = response.headers.get("content-type", "")
        return msgpack.unpackb(response.content) if kind == "application/msgpack" else response.json()
    try:
        body = response.json()
        message, hint = str(body["error"]), body.get("hint")
    except (ValueError, KeyError, TypeError):
        message, hint = response.text[:200], None
    raise RunFailed(f"the hub refused {call.method} {call.path} ({response.status_code}): {message}", hint)


class _Patience:
    """How long to go on asking a hub that does not answer."""

    def __init__(self, url: str):
        self._url = url
        self._end = time.monotonic() + RETRY_S
        self._pause_s = 0.05

    def next_pause(self, error: Exception) -> float:
        """Seconds until the next try. Raises RunFailed when there is none."""
        if time.monotonic() + self._pause_s > self._end:
            raise RunFailed(
                f"the hub at {self._url} did not answer for {RETRY_S:g} s: {error or type(error).__name__}",
                "its own log says why; `astra train --resume RUN_DIR` goes on from the last checkpoint",
            ) from error
        pause, self._pause_s = self._pause_s, min(1.0, self._pause_s * 2)
        return pause


class HubClient(_Calls):
    """Blocking; one connection pool, usable from several threads. A context manager."""

    def __init__(self, url: str, token: str):
        self._url = url
        self._token = token
        self._http = httpx.Client(**_settings(url, token))

    def _send(self, call: _Call) -> Any:
        patience = _Patience(self._url)
        while True:
            try:
                return _decode(call, self._large(call) if call.path == "/batch" else self._small(call))
            except (httpx.TransportError, http.client.HTTPException, OSError) as error:
                time.sleep(patience.next_pause(error))

    def _small(self, call: _Call) -> httpx.Response:
        headers = {"Content-Type": call.content_type}
        return self._http.request(call.method, call.path, content=call.content, headers=headers)

    def _large(self, call: _Call) -> httpx.Response:
        """The same, for an answer of many megabytes: read in one piece, where httpx would take 64 kB at a time."""
        address = urlsplit(self._url)
        connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=READ_TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": call.content_type}
            connection.request(call.method, call.path, call.content, headers)
            reply = connection.getresponse()
            kind = reply.headers.get("content-type", "")
            return httpx.Response(reply.status, headers={"content-type": kind}, content=reply.read())
        finally:
            connection.close()

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class AsyncHubClient(_Calls):
    """For one asyncio loop; every method returns an awaitable. An async context manager."""

    def __init__(self, url: str, token: str):
        self._url = url
        self._http = httpx.AsyncClient(**_settings(url, token))

    async def _send(self, call: _Call) -> Any:
        patience = _Patience(self._url)
        while True:
            try:
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers={"Content-Type": call.content_type}
                )
                return _decode(call, response)
            except httpx.TransportError as error:
                await asyncio.sleep(patience.next_pause(error))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncHubClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()
