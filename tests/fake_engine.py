"""A small engine for tests of what talks to engines: real sockets, SGLang's routes, tokens that follow from the seed.

Token t of a sample is a function of (seed, t) alone, whatever the version and however often the request was cut: a
completion that was continued must equal one that was not. Its log-probability tells the version: -1 - version.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from astracli.engines.sglang.client import SETTLE_LOADER
from astracli.errors import RunFailed
from astracli.process.server import ServerThread
from astracli.weights.receive.subscriber import StagedPlan

BROKEN = -99.0
"""Log-probability of what is drawn from weights that an update failed to change."""


def token(seed: int, position: int) -> int:
    return 3 + (seed // (position + 7)) % 90


@dataclass
class FakeEngine:
    token: str
    length: int | Callable[[int], int] = 20
    """Tokens of a completion, or a law of its seed; the last is the stop token 1."""
    step_s: float = 0.01
    """Seconds a token takes."""
    ticks: int | None = None
    """A clock that the test turns, a token of every request at each tick; None: `step_s`."""
    version: int = 0
    serving: bool = True
    paused: bool = False
    refusals: int = 0
    """Updates that will fail."""
    update_session: bool = False
    """Takes updates only between begin and end, as SGLang from 0.5.21 on."""
    begun: bool = False
    sticky: bool = False
    """An end does not end it: another client has begun again."""
    broken: list[str] = field(default_factory=list)
    """Paths whose next call is answered with 500."""
    cuts: int = 0
    """Answers of `/generate` whose connection will break behind the first one of their results."""
    generated: int = 0
    """Calls of `/generate`."""
    update_s: float = 0.0
    events: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    """Memory that is another's now."""
    stage_dir: Path | None = None
    """As SGLang with our loader: answers success to every update, and the outcome is a file here."""
    results: list[dict[str, Any] | None] = field(default_factory=list)
    """What the loader will write into it, by and by; None: nothing, as when it never ran. Afterwards version 1."""
    cached_share: float | None = None
    """Part of every prompt that its prefix cache had; None: it does not say."""
    readbacks: bool = False
    """Whether a read-back follows each update."""
    running: int = 0
    clocks: dict[int, int] = field(default_factory=dict)
    """Tick up to which each running request has drawn."""
    port: int = 0
    _aborts: int = 0
    _thread: ServerThread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> FakeEngine:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        routes = [
            Route("/health_generate", self._ok, methods=["GET"]),
            Route("/model_info", self._info, methods=["GET"]),
            Route("/generate", self._generate, methods=["POST"]),
            Route("/abort_request", self._abort, methods=["POST"]),
            Route("/pause_generation", self._pause, methods=["POST"]),
            Route("/continue_generation", self._continue, methods=["POST"]),
            Route("/update_weights_from_tensor", self._update, methods=["POST"]),
            Route("/update_weight_version", self._label, methods=["POST"]),
            Route("/release_memory_occupation", self._release, methods=["POST"]),
            Route("/resume_memory_occupation", self._take_back, methods=["POST"]),
        ]
        if self.update_session:
            routes.append(Route("/begin_weight_update", self._begin, methods=["POST"]))
            routes.append(Route("/end_weight_update", self._end, methods=["POST"]))
        self._thread = ServerThread(Starlette(routes=routes), listener).start()
        return self

    def stop(self) -> None:
        assert self._thread is not None
        self._thread.stop()

    @property
    def ticked(self) -> bool:
        """Whether everything that runs has drawn up to the last tick."""
        return all(clock == self.ticks for clock in list(self.clocks.values()))

    async def _ok(self, request: Request) -> Response:
        return JSONResponse({})

    async def _info(self, request: Request) -> Response:
        return JSONResponse({"weight_version": str(self.version), "serving": self.serving, "paused": self.paused})

    async def _generate(self, request: Request) -> Response:
        assert request.headers["authorization"] == f"Bearer {self.token}"
        if not self.serving:
            return JSONResponse({"error": {"message": "not serving"}}, 503)
        body = await request.json()
        offsets = body.get("draw_offset") or [0] * len(body["input_ids"])
        rows = zip(body["input_ids"], body["sampling_params"], offsets, strict=True)
        asked = [asyncio.ensure_future(self._counted(place, *row)) for place, row in enumerate(rows)]
        self.generated += 1
        if self.cuts:
            self.cuts -= 1
            return StreamingResponse(self._cut(self._events(asked)))
        if body.get("stream"):
            return StreamingResponse(self._events(asked))
        answers = await asyncio.gather(*asked)
        return JSONResponse(answers)

    async def _events(self, asked: list[asyncio.Task[dict[str, Any]]]) -> AsyncIterator[str]:
        try:
            for ended in asyncio.as_completed(asked):
                yield f"data: {json.dumps(await ended)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            for task in asked:
                task.cancel()

    async def _cut(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        async for event in events:
            yield event
            raise ConnectionResetError("as a network does it")

    async def _counted(self, place: int, ids: list[int], params: dict[str, Any], offset: int) -> dict[str, Any]:
        self.running += 1
        self.clocks[params["sampling_seed"]] = self.ticks or 0
        try:
            return await self._one(ids, params, offset) | {"index": place}
        finally:
            self.running -= 1
            del self.clocks[params["sampling_seed"]]

    async def _one(self, ids: list[int], params: dict[str, Any], offset: int) -> dict[str, Any]:
        aborts, start, seed = self._aborts, self.version, params["sampling_seed"]
        length = self.length if isinstance(self.length, int) else self.length(seed)
        begun = self.ticks or 0
        out: list[int] = []
        logprobs: list[Any] = []
        reason = "length"
        while len(out) < params["max_new_tokens"]:
            await asyncio.sleep(self.step_s)
            if self._aborts > aborts:
                reason = "abort"
                break
            while self.paused or (self.ticks is not None and self.ticks - begun <= len(out)):
                await asyncio.sleep(self.step_s)
            assert not self.released
            position = offset + len(out)
            out.append(1 if position == length - 1 else token(seed, position))
            # requests kept through an update go on whatever it left behind
            logprobs.append([-1.0 - self.version if self.serving else BROKEN, out[-1], None])
            self.clocks[seed] = begun + len(out)
            if out[-1] in params["stop_token_ids"]:
                reason = "stop"
                break
        meta = {"id": "x", "finish_reason": {"type": reason}, "output_token_logprobs": logprobs}
        versions = {"weight_version": str(self.version), "weight_version_start": str(start)}
        if self.cached_share is not None:
            versions |= {"cached_tokens": int(self.cached_share * len(ids))}
        return {"output_ids": out, "meta_info": meta | versions}

    async def _abort(self, request: Request) -> Response:
        self._aborts += 1
        return JSONResponse({})

    async def _pause(self, request: Request) -> Response:
        mode = (await request.json())["mode"]
        self.events.append(f"pause {mode} with {self.running} running")
        self.paused = True
        return JSONResponse({})

    async def _continue(self, request: Request) -> Response:
        assert not self.begun, "would generate before the layers' work after loading"
        self.paused = False
        return JSONResponse({})

    async def _release(self, request: Request) -> Response:
        assert self.paused and not self.running and not self.begun, "as SGLang, which dies otherwise"
        self.released = (await request.json())["tags"]
        self.events.append(f"released {' '.join(self.released)}")
        return JSONResponse(None)  # SGLang answers `null`

    async def _take_back(self, request: Request) -> Response:
        assert (await request.json())["tags"] == self.released
        self.released = []
        self.events.append("resumed")
        return JSONResponse(None)

    async def _begin(self, request: Request) -> Response:
        assert await request.json() == {} and self.paused
        return self._switch(request, "begun", True, "a weight-update session is already open")

    async def _end(self, request: Request) -> Response:
        return self._switch(request, "ended", False, "no weight-update session is open")

    def _switch(self, request: Request, event: str, to: bool, refusal: str) -> Response:
        if answer := self._broken(request):
            return answer
        if self.begun is to:
            return JSONResponse({"success": False, "message": refusal}, 400)
        self.begun = to or self.sticky
        self.events.append(event)
        return JSONResponse({"success": True, "message": "Success"})

    def _broken(self, request: Request) -> Response | None:
        if request.url.path not in self.broken:
            return None
        self.broken.remove(request.url.path)
        return JSONResponse({"error": {"message": "broken"}}, 500)

    async def _update(self, request: Request) -> Response:
        assert self.paused and not self.released
        body = await request.json()
        await asyncio.sleep(self.update_s)
        if answer := self._broken(request):
            return answer
        if self.update_session and not self.begun:
            return JSONResponse({"success": False, "message": "must run between begin and end"}, 400)
        if body["load_format"] == SETTLE_LOADER:
            self.events.append("settled")
            return JSONResponse({"success": True, "message": "Success"})
        version = int(body["weight_version"])
        if self.refusals:
            self.refusals -= 1
            self.serving = False
            self.events.append(f"refused {version}")
            return JSONResponse({"success": False, "message": "digest of lm_head differs"}, 400)
        self.version, self.serving = version, True
        self.events.append(f"applied {version}")
        if self.stage_dir is not None:
            result = self.results.pop(0) if self.results else {"version": 1, "apply_s": 0.001}
            if result is not None:
                (self.stage_dir / "result.json").write_text(json.dumps({"ok": True, "message": "", **result}))
            return JSONResponse({"success": True, "message": "Success"})
        outcome = {"apply_s": 0.001, "changed": 7, "readback": self.readbacks}
        return JSONResponse({"success": True, "message": "", "outcome": outcome})

    async def _label(self, request: Request) -> Response:
        body = await request.json()
        self._aborts += body.get("abort_all_requests", True)  # as in SGLang
        self.version = int(body["new_version"])
        self.events.append(f"called {self.version}")
        return JSONResponse({"success": True})


@dataclass
class FakeFetcher:
    """Stages nothing; remembers what was asked for."""

    asked: list[tuple[int, int | None]] = field(default_factory=list)
    stage_dir: Path | None = None

    def fetch(self, target_version: int, have_version: int | None = None) -> StagedPlan:
        self.asked.append((target_version, have_version))
        return StagedPlan(target_version, "full" if have_version is None else "delta", ("x",), 100, 100, 0.0, 0.001)

    readbacks: list[RunFailed | float] = field(default_factory=list)
    """What the coming read-backs find."""

    watched: bool = True
    woken: list[int] = field(default_factory=list)

    def wake(self, version: int) -> None:
        self.woken.append(version)
        self.watched = True

    def readback(self, version: int) -> dict[str, float]:
        found = self.readbacks.pop(0)
        if isinstance(found, RunFailed):
            raise found
        return {"readback_s": found}
