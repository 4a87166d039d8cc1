"""The client of an engine that speaks these routes. An engine that speaks otherwise overrides what differs
(`Engine.client`).

| route | body | answer |
|---|---|---|
| GET /health_generate | | 200 once the model is loaded, else 503 |
| GET /model_info | | model_path, weight_version, serving, problem, paused, running, ... |
| POST /generate | input_ids, sampling_params, rid, draw_offset | output_ids and meta_info; 503 while not serving |
| | the same and stream: true | server-sent events, one for each request when it ends, with its place as `index` |
| POST /abort_request | abort_all | aborted: how many |
| POST /pause_generation | mode: abort, retract, in_place | |
| POST /continue_generation | | |
| POST /update_weights_from_tensor | load_format, weight_version; applies what is staged | success, message, outcome |
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import orjson

from astracli.engines.asked import STAGED
from astracli.engines.contract import Ended, GenRequest, GenResult, PauseMode, UpdateReply
from astracli.engines.control import ControlThread
from astracli.errors import RunFailed
from astracli.process import intact
from astracli.process.http import Http, HttpError, Reply

T = TypeVar("T")
_MEMORY = {"tags": ["kv_cache", "weights"]}
"""What an engine gives back for a trainer. (Recurrent states belong to the KV cache.)"""
_RETRY_S = 0.1
CONTROL_S = 600.0
"""How long a call that generates nothing may take: control, or an update."""


class CallLost(RunFailed):
    """The connection of a call that generates broke, or its answer was changed on the way: the engine may still be
    there, and whoever asked may ask it again."""


class EngineClient:
    """Talks to one engine. An error that trying again does not solve is a RunFailed with the engine's name and URL.

    Requests that generate belong to the caller's event loop. Every other call has a thread, an event loop and
    connections of its own (`control`), so that none of them waits behind thousands of answers.
    """

    single_requests = False
    """`generate` makes a call of each request: nothing is gained by giving it several at once."""

    def __init__(self, url: str, token: str, *, name: str = "engine", not_serving_s: float = 120.0):
        self.url = url.rstrip("/")
        self.name = name
        self.not_serving_s = not_serving_s
        """A 503 of `/generate` is retried this long."""
        self._http = Http(self.url, token)
        self._control_http = Http(self.url, token)
        self._control = ControlThread()

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        if self._control.begun:
            await self._control.run(self._control_http.close())
            self._control.close()

    # -- readiness

    async def health(self) -> bool:
        """Whether the engine is up with its model loaded. A refused connection is False, a wrong token raises."""
        try:
            reply = await self.control(self._control_http.request("GET", "/health_generate", timeout=30.0))
        except (HttpError, TimeoutError):
            return False
        if reply.status_code == 401:
            raise self._failure("refused the run's token")
        return reply.status_code == 200

    async def wait_ready(self, timeout: float) -> None:
        """Wait until `health` is True. Raises RunFailed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not await self.health():
            if time.monotonic() > deadline:
                raise self._failure(f"was not ready within {timeout:g} s", "read its log in the run directory")
            await asyncio.sleep(_RETRY_S)

    async def model_info(self) -> dict[str, Any]:
        """model_path, weight_version (a string), and what else the engine says: serving, paused, ..."""
        return await self._send("GET", "/model_info")

    # -- generation

    async def generate(self, requests: Sequence[GenRequest], ended: Ended | None = None) -> list[GenResult]:
        """Generate all; results in the order of the requests. Waits for as long as it takes.

        With `ended`, which is called with each result when its request ends, the answer comes piece by piece.

        Raises CallLost when the connection breaks, also because the engine died, and RunFailed when the engine refuses
        a request or does not serve for `not_serving_s`. What else was asked for with it is then abandoned.
        """
        if not requests:
            return []
        return await (self._call_for(requests) if ended is None else self._stream(requests, ended))

    async def _call_for(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        """Every result in one answer."""
        body = _encoded(self.body(requests))
        deadline = time.monotonic() + self.not_serving_s
        while True:
            try:
                reply = await self._http.request("POST", "/generate", body, timeout=None)
            except HttpError as error:
                raise self._gone(error, "/generate", CallLost) from None
            if reply.status_code != 503 or time.monotonic() > deadline:
                break
            await asyncio.sleep(_RETRY_S)
        if self._never_began(reply):
            return [_nothing(request) for request in requests]
        answers = self._content(reply, "/generate")
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise self._failure(f"answered /generate with something else than {len(requests)} results")
        return [self._read(request, answer) for request, answer in zip(requests, answers, strict=True)]

    async def _stream(self, requests: Sequence[GenRequest], ended: Ended) -> list[GenResult]:
        """One call whose results come as their requests end."""
        body = _encoded(self.body(requests) | {"stream": True})
        deadline = time.monotonic() + self.not_serving_s
        results: dict[int, GenResult] = {}
        while True:
            try:
                async with self._http.stream("POST", "/generate", body) as streamed:
                    if streamed.status_code == 200:
                        said = None
                        async for line in streamed.lines():
                            if line.startswith(b"id: "):
                                said = line.removeprefix(b"id: ").decode()
                            if line.startswith(b"data: {"):
                                if intact.damaged(line, said):
                                    raise HttpError(f"the answer: {intact.WORDS}")
                                answer = _decoded(line[len(b"data: ") :])
                                result = self._read(requests[answer["index"]], answer)
                                results[answer["index"]] = result
                                ended(answer["index"], result)
                        break
                    reply = await streamed.read()
            except HttpError as error:
                raise self._gone(error, "/generate", CallLost) from None
            if reply.status_code != 503 or time.monotonic() > deadline:
                self._content(reply, "/generate")
            await asyncio.sleep(_RETRY_S)
        if len(results) != len(requests):
            raise self._failure(f"answered /generate with {len(results)} of {len(requests)} results")
        return [results[place] for place in range(len(requests))]

    def body(self, requests: Sequence[GenRequest]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input_ids": [list(request.input_ids) for request in requests],
            "sampling_params": [
                {
                    "temperature": request.temperature,
                    "top_p": request.top_p,
                    "max_new_tokens": request.max_new_tokens,
                    "stop_token_ids": list(request.stop_token_ids),
                    "sampling_seed": request.seed,
                    **({"stop": list(request.stop.texts)} if request.stop is not None else {}),
                }
                for request in requests
            ],
            "return_logprob": True,
        }
        if any(request.draw_offset for request in requests):
            body["draw_offset"] = [request.draw_offset for request in requests]
        if all(request.rid is not None for request in requests):
            body["rid"] = [request.rid for request in requests]
        return body

    def _read(self, request: GenRequest, answer: Mapping[str, Any]) -> GenResult:
        """A request's result. Raises RunFailed for an answer that holds no tokens of the model."""
        return _ended(request, _result(answer))

    def _never_began(self, reply: Reply) -> bool:
        """Whether a call was refused because an abort met it before it was under way."""
        return False

    async def abort_all(self) -> None:
        """End every request; each returns what it has, with finish reason `abort`."""
        await self._send("POST", "/abort_request", {"abort_all": True})

    # -- weights

    async def pause(self, mode: PauseMode = "abort") -> None:
        await self._send("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._send("POST", "/continue_generation", {})

    async def release_memory(self) -> None:
        """Give the GPU memory of weights (the engine keeps a copy), KV cache and recurrent states back until
        `resume_memory`. The engine must be idle: end its requests first."""
        await self._send("POST", "/release_memory_occupation", _MEMORY)

    async def resume_memory(self) -> None:
        """Take the memory back. The KV cache is empty then."""
        await self._send("POST", "/resume_memory_occupation", _MEMORY)

    async def apply_staged(self, version: int, *, flush: bool = True) -> UpdateReply:
        """Apply what is staged for this engine. A failed update is an answer, not an exception: stage a full payload
        and apply again."""
        body = {"load_format": STAGED, "weight_version": str(version), "flush_cache": flush}
        return await self._update("/update_weights_from_tensor", body)

    async def update(
        self, version: int, mode: PauseMode, *, flush: bool, applied: Callable[[UpdateReply], None] | None = None
    ) -> UpdateReply:
        """Pause, apply what is staged, go on: one after the other, whatever the caller's event loop does meanwhile.

        `pause_s` of the outcome is the time from the first call to the last answer. An engine that has failed to apply
        stays paused. `applied` gets the answer before generation goes on, in the thread of `control`.
        """

        async def paused() -> UpdateReply:
            begun = time.monotonic()
            await self.pause(mode)
            reply = await self.apply_staged(version, flush=flush)
            if not reply.success:
                return reply
            if applied is not None:
                applied(reply)
            await self.resume()
            return UpdateReply(True, reply.message, {**reply.outcome, "pause_s": time.monotonic() - begun})

        return await self.control(paused())

    async def settle(self) -> None:
        """Wait until no read-back reads the weights: one may still run although nobody waits for it. Call it in a
        pause."""

    async def _update(self, path: str, body: Mapping[str, Any], limit_s: float = CONTROL_S) -> UpdateReply:
        reply = await self._request("POST", path, body, timeout=limit_s)
        if reply.status_code == 400:
            document = _json(reply)
            if isinstance(document, dict) and "success" in document:
                return UpdateReply(False, str(document.get("message", "")))
        document = self._content(reply, path)
        return UpdateReply(bool(document["success"]), str(document.get("message", "")), document.get("outcome") or {})

    # -- transport

    async def control(self, calls: Coroutine[Any, Any, T]) -> T:
        """Run calls that generate nothing in the thread that is theirs; from there, at once."""
        return await self._control.run(calls)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._content(await self._request(method, path, body, timeout=CONTROL_S), path)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout: float) -> Reply:
        content = None if body is None else _encoded(body)
        try:
            return await self.control(self._control_http.request(method, path, content, timeout=timeout))
        except TimeoutError:
            raise self._failure(f"did not answer {path} within {timeout:g} s") from None
        except HttpError as error:
            raise self._gone(error, path) from None

    def _content(self, reply: Reply, path: str) -> Any:
        document = _json(reply)
        if reply.status_code == 200:
            return document
        problem = document.get("error") if isinstance(document, dict) else None
        message = problem.get("message") if isinstance(problem, dict) else None
        detail = message or (document.get("message") if isinstance(document, dict) else None) or reply.text[:300]
        raise self._failure(f"answered {path} with {reply.status_code}: {detail}")

    def _gone(self, error: Exception, path: str, kind: type[RunFailed] = RunFailed) -> RunFailed:
        return self._failure(f"is gone: {error or type(error).__name__} ({path})", "read its log", kind)

    def _failure(self, what: str, hint: str | None = None, kind: type[RunFailed] = RunFailed) -> RunFailed:
        return kind(f"{self.name} at {self.url} {what}", hint)


def _encoded(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)  # tokens may be numpy's integers


def _decoded(content: bytes) -> Any:
    """JSON, also with NaN and infinities, which `json.dumps` of an engine may write. Raises ValueError."""
    try:
        return orjson.loads(content)
    except ValueError:
        return json.loads(content)


def _json(reply: Reply) -> Any:
    """The body as JSON; a 200 that is empty, text or `null` (some control routes) becomes {"message": text}."""
    try:
        document = _decoded(reply.content)
    except ValueError:
        document = None
    return {"message": reply.text[:300]} if document is None and reply.status_code == 200 else document


def _nothing(request: GenRequest) -> GenResult:
    """A request that was ended before its first token."""
    version = np.iinfo(np.int64).max  # no token bears it
    return GenResult(np.zeros(0, np.int32), np.zeros(0, np.float32), "abort", version, version, request.rid or "")


def _ended(request: GenRequest, result: GenResult) -> GenResult:
    """The result up to its first stop string. A stop token that is the last one allowed ends it as well, also where an
    engine looks at the limit first."""
    if result.finish_reason == "length" and len(result.tokens) and int(result.tokens[-1]) in request.stop_token_ids:
        result = replace(result, finish_reason="stop")
    if request.stop is None:
        return result
    return request.stop.ended(request.input_ids[len(request.input_ids) - request.draw_offset :], result)


def _result(answer: Mapping[str, Any]) -> GenResult:
    meta = answer["meta_info"]
    version = int(meta["weight_version"])
    return GenResult(
        tokens=np.array(answer.get("output_ids") or [], np.int32),
        logprobs=np.array([entry[0] for entry in meta.get("output_token_logprobs") or []], np.float32),
        finish_reason=meta["finish_reason"]["type"],
        version=version,
        version_start=int(meta.get("weight_version_start", version)),
        rid=meta["id"],
        cached_tokens=meta.get("cached_tokens"),
        engine_s=meta.get("e2e_latency"),
    )
