"""The embedded engine's HTTP server: the routes that `engines/client.py` lists. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from astracli.engines.asked import is_batch, update
from astracli.engines.contract import GenResult, PauseMode
from astracli.engines.http import disconnected, error, events, json_body
from astracli.errors import UserError
from astracli.process.server import TokenGuard

if TYPE_CHECKING:
    from astracli.engines.embedded.engine import EmbeddedEngine

T = TypeVar("T")
Handler = Callable[["EmbeddedEngine", Request], Awaitable[Response]]


def build_app(loaded: Sequence[EmbeddedEngine], token: str) -> ASGIApp:
    """The ASGI application. `loaded` holds the engine once it is loaded; until then every route answers 503."""

    def route(path: str, method: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            if not loaded:
                return error(503, "not ready: the model is being loaded")
            try:
                return await handler(loaded[0], request)
            except UserError as refused:
                return error(400, f"{refused.message}; {refused.hint}" if refused.hint else refused.message)

        return Route(path, endpoint, methods=[method])

    app = Starlette(
        routes=[
            route("/health_generate", "GET", _health),
            route("/model_info", "GET", _info),
            route("/generate", "POST", _generate),
            route("/abort_request", "POST", _abort),
            route("/pause_generation", "POST", _pause),
            route("/continue_generation", "POST", _continue),
            route("/update_weights_from_tensor", "POST", _update),
        ]
    )
    return TokenGuard(app, token, error(401, "the run's token is missing or wrong"))


async def _between_steps(engine: EmbeddedEngine, function: Callable[[], T]) -> T:
    """Have the decode thread call `function` between two steps."""
    return await asyncio.wrap_future(engine.scheduler.call(function))


async def _health(engine: EmbeddedEngine, request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _info(engine: EmbeddedEngine, request: Request) -> Response:
    return JSONResponse(engine.info())


async def _generate(engine: EmbeddedEngine, request: Request) -> Response:
    from astracli.engines.embedded.engine import NotServing

    body = await json_body(request)
    loop = asyncio.get_running_loop()
    ended: asyncio.Queue[tuple[int, GenResult]] = asyncio.Queue()

    def deliver(place: int, completion: GenResult) -> None:
        loop.call_soon_threadsafe(ended.put_nowait, (place, completion))

    try:
        rids = engine.generate(body, deliver)
    except NotServing as reason:
        return error(503, f"not serving: {reason}")
    answers = _answers(engine, request, rids, ended)
    if body.get("stream"):
        return StreamingResponse(events(answers), media_type="text/event-stream")
    found = {place: answer async for place, answer in answers}
    if len(found) < len(rids):
        return Response(status_code=499)
    return JSONResponse([found[place] for place in range(len(rids))] if is_batch(body) else found[0])


async def _answers(
    engine: EmbeddedEngine, request: Request, rids: list[str], ended: asyncio.Queue[tuple[int, GenResult]]
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Each request's place and answer when it ends. Of a client that hangs up, what is left is aborted."""
    gone = asyncio.ensure_future(disconnected(request))
    left = len(rids)
    try:
        while left:
            following = asyncio.ensure_future(ended.get())
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                break
            left -= 1
            place, completion = following.result()
            yield place, _answer(completion)
    finally:
        gone.cancel()
        if left:
            engine.scheduler.call(lambda: engine.scheduler.abort(rids))


def _answer(completion: GenResult) -> dict[str, Any]:
    tokens = completion.tokens.tolist()
    pairs = zip(completion.logprobs.tolist(), tokens, strict=True)
    return {
        "text": "",
        "output_ids": tokens,
        "meta_info": {
            "id": completion.rid,
            "finish_reason": {"type": completion.finish_reason},
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
            "weight_version": str(completion.version),
            "weight_version_start": str(completion.version_start),
        },
    }


async def _abort(engine: EmbeddedEngine, request: Request) -> Response:
    if not (await json_body(request)).get("abort_all"):
        raise UserError("abort_request needs `abort_all`")
    return JSONResponse({"aborted": await _between_steps(engine, engine.scheduler.abort)})


async def _pause(engine: EmbeddedEngine, request: Request) -> Response:
    mode = (await json_body(request)).get("mode", "abort")
    if mode not in get_args(PauseMode):
        raise UserError(f"pause mode {mode!r:.40} is not one of {', '.join(get_args(PauseMode))}")
    await _between_steps(engine, lambda: engine.scheduler.pause(mode))
    return JSONResponse({"status": "ok", "message": "paused"})


async def _continue(engine: EmbeddedEngine, request: Request) -> Response:
    await _between_steps(engine, engine.scheduler.resume)
    return JSONResponse({"status": "ok", "message": "continued"})


async def _update(engine: EmbeddedEngine, request: Request) -> Response:
    version, flush = update(await json_body(request))
    reply = await _between_steps(engine, lambda: engine.apply_staged(version, flush=flush))
    return JSONResponse(vars(reply), status_code=200 if reply.success else 400)
