"""The server around a vLLM engine, run in vLLM's environment: `python -m astracli.engines.vllm.serve CONFIG.json`.

It speaks the routes of `engines/client.py`, so that one call carries many requests, every answer bears the weights that
drew it, and none of vLLM's development routes has to be opened. CONFIG.json holds the token, so it is read by its owner
alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from astracli.engines.asked import is_batch, read, update
from astracli.engines.contract import UNPROVEN
from astracli.engines.http import disconnected, error, events, json_body
from astracli.engines.vllm.engine import Library, VllmEngine
from astracli.errors import UserError
from astracli.process.server import TokenGuard, guarded

MODES = ("abort", "retract", "in_place")
GONE_S = 0.05


def build_app(engine: VllmEngine, token: str) -> TokenGuard:
    def route(path: str, method: str, handler: Callable[[VllmEngine, Request], Awaitable[Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(engine, request)
            except UserError as refused:
                return error(400, refused.message)

        return Route(path, endpoint, methods=[method])

    app = Starlette(
        routes=[
            route("/health_generate", "GET", _health),
            route("/model_info", "GET", _info),
            route("/generate", "POST", _generate),
            route("/abort_request", "POST", _abort),
            route("/pause_generation", "POST", _pause),
            route("/continue_generation", "POST", _continue),
            route("/release_memory_occupation", "POST", _release),
            route("/resume_memory_occupation", "POST", _take),
            route("/update_weights_from_tensor", "POST", _update),
        ]
    )
    return TokenGuard(app, token, error(401, "the run's token is missing or wrong"))


async def _health(engine: VllmEngine, request: Request) -> Response:
    await engine.llm.check_health()
    return JSONResponse({"status": "ok"})


async def _info(engine: VllmEngine, request: Request) -> Response:
    return JSONResponse(engine.info())


async def _generate(engine: VllmEngine, request: Request) -> Response:
    body = await json_body(request)
    asked = read(body, vocabulary=engine.vocabulary, context_length=engine.context_length)
    if engine.problem is not None:
        return error(503, f"not serving: {engine.problem}")
    calls = [engine.generate(one) for one in asked]
    answers = _answers(request, calls)
    if body.get("stream"):
        return StreamingResponse(events(answers), media_type="text/event-stream")
    found = {place: answer async for place, answer in answers}
    if len(found) < len(calls):
        return Response(status_code=499)
    return JSONResponse([found[place] for place in range(len(calls))] if is_batch(body) else found[0])


async def _answers(request: Request, calls: list[Any]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Each request's place and answer when it ends. Of a client that hangs up, what is left is aborted."""
    tasks = {asyncio.ensure_future(call): place for place, call in enumerate(calls)}
    gone, left = asyncio.ensure_future(disconnected(request)), set(tasks)
    try:
        while left and not gone.done():
            done, _ = await asyncio.wait({*left, gone}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {gone}:
                left.discard(task)
                yield tasks[task], task.result()
    finally:
        gone.cancel()
        for task in left:  # AsyncLLM aborts a request whose reader is cancelled
            task.cancel()


async def _abort(engine: VllmEngine, request: Request) -> Response:
    if not (await json_body(request)).get("abort_all"):
        raise UserError("abort_request needs `abort_all`")
    return JSONResponse({"aborted": await engine.abort_all()})


async def _pause(engine: VllmEngine, request: Request) -> Response:
    mode = (await json_body(request)).get("mode", "abort")
    if mode not in MODES:
        raise UserError(f"pause mode {mode!r:.40} is not one of {', '.join(MODES)}")
    await engine.pause(mode)
    return JSONResponse({"status": "ok", "message": "paused"})


async def _continue(engine: VllmEngine, request: Request) -> Response:
    await engine.resume()
    return JSONResponse({"status": "ok", "message": "continued"})


async def _release(engine: VllmEngine, request: Request) -> Response:
    await engine.sleep()
    return JSONResponse({"status": "ok"})


async def _take(engine: VllmEngine, request: Request) -> Response:
    await engine.wake()
    return JSONResponse({"status": "ok"})


async def _update(engine: VllmEngine, request: Request) -> Response:
    version, flush = update(await json_body(request), least=UNPROVEN)  # that one is refused, and our loader runs then
    success, message, outcome = await engine.apply_staged(version, flush=flush)
    document = {"success": success, "message": message, "outcome": outcome}
    return JSONResponse(document, status_code=200 if success else 400)


def start(told: dict[str, Any]) -> VllmEngine:
    """vLLM as CONFIG.json says, called where an event loop runs."""
    from vllm import SamplingParams, exceptions
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    asked = told["engine"]
    return VllmEngine(
        AsyncLLM.from_engine_args(AsyncEngineArgs(**asked)),
        Library(
            partial(SamplingParams, output_kind=RequestOutputKind.FINAL_ONLY),
            tokens_input,
            (ValueError, getattr(exceptions, "VLLMClientError", ValueError)),  # of 0.20.2, and of 0.33.0
        ),
        model=asked["model"],
        serving=told["serving"],
        seeded=told["seeded"],
        cached=asked["enable_prefix_caching"],
        vocabulary=told["vocabulary"],
        context_length=asked["max_model_len"],
        sleeps=asked["enable_sleep_mode"],
    )


async def _serve(told: dict[str, Any]) -> None:
    engine = start(told)
    llm = engine.llm
    server, listening = guarded(build_app(engine, told["token"]), told["host"], told["port"])
    watching = asyncio.ensure_future(_until_dead(llm))
    serving = asyncio.ensure_future(server.serve([listening]))
    done, _ = await asyncio.wait({watching, serving}, return_when=asyncio.FIRST_COMPLETED)
    with suppress(Exception):
        llm.shutdown()
    for task in done:
        task.result()


async def _until_dead(llm: Any) -> None:
    """Raises what vLLM says when its engine's process has ended."""
    while True:
        await llm.check_health()
        await asyncio.sleep(GONE_S)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(Path(sys.argv[1]).read_text())))
