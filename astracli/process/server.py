"""An HTTP server in a thread of this process, and the checks that guard it: the run's token, and no browser."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from astracli.errors import RunFailed
from astracli.process import ports
from astracli.process.connections import TRUSTED, Guarded, most_connections
from astracli.process.console import say
from astracli.process.intact import Intact

KEEP_ALIVE_S = 75
HOLDER = "astra.holder"
"""Key in a request's scope: the name of who holds its token, where that is not the run's."""
CLOSE = "close"
"""Of a refused request the connection ends: its body is not read."""


class TokenGuard:
    """ASGI middleware: a request without `Authorization: Bearer TOKEN` is answered with 401 and `refusal`.

    Requests that a browser could have been made to send are refused before: 403 with an `Origin`, 421 when `Host` is a
    name that is not this server's (a page whose name was pointed at this machine: DNS rebinding). No process of a run
    sends either.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        refusal: JSONResponse,
        others: Callable[[str], str | None] = lambda token: None,
        limits: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    ):
        """`others`: who else holds a token that is taken, by its name; the application finds it in its scope.
        `limits`: what looks at a request before its body is read."""
        self._app = limits(Intact(app))
        self._expected = f"Bearer {token}".encode()
        self._others = others
        self._refusal = refusal

        self._refusal.headers["connection"] = CLOSE
        self.host: str | None = None
        """The name under which the server is reached, besides addresses and `localhost`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        refusal = self._browser(headers)
        said = headers.get(b"authorization", b"")
        if refusal is None and not hmac.compare_digest(said, self._expected):
            scope[HOLDER] = self._others(said.decode("latin-1").removeprefix("Bearer "))
            refusal = self._refusal if scope[HOLDER] is None else None
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        scope[TRUSTED] = True
        with suppress(ClientDisconnect):  # a client that ends in the middle of a request is no error of the server
            await self._app(scope, receive, send)

    def _browser(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """The refusal of a request that a page in a browser may have sent; None for any other."""
        if b"origin" in headers:
            return JSONResponse({"error": "no browser may ask"}, 403, {"connection": CLOSE})
        host = headers.get(b"host", b"").decode("latin-1")
        if not _is_own(host, self.host):
            return JSONResponse({"error": "this server has another name"}, 421, {"connection": CLOSE})
        return None


def _is_own(host: str, name: str | None) -> bool:
    """Whether a `Host` header names a server by an address, as `localhost`, or by its own `name`."""
    bare = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if bare.lower().rstrip(".") in ("localhost", (name or "localhost").lower()):
        return True
    with suppress(ValueError):
        ipaddress.ip_address(bare)
        return True
    return False


class _Server(uvicorn.Server):
    """When this process has no descriptor left for a new connection, asyncio tries again a second later. That is said
    once, in a line."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        said: list[str] = []

        def complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if not isinstance(context.get("exception"), OSError) or "accept" not in context.get("message", ""):
                loop.default_exception_handler(context)
            elif not said:
                said.append("")
                say(f"warning: no new connections for now: {context['exception']} (`ulimit -n` is the limit)")

        asyncio.get_running_loop().set_exception_handler(complain)
        await super().startup(sockets)


def _server(app: ASGIApp, host: str | None) -> _Server:
    protocol: Any = "h11"
    if isinstance(app, TokenGuard):
        app.host = host
        protocol = type("Limited", (Guarded,), {"most": most_connections()})
    config = uvicorn.Config(
        app,
        loop="asyncio",  # `auto` takes whatever some other package installed
        http=protocol,
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


def _undelayed(sock: socket.socket) -> socket.socket:
    """asyncio sets this only on sockets that were made with proto=IPPROTO_TCP; without it an answer waits 40 ms for a
    delayed acknowledgement."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def guarded(app: TokenGuard, host: str, port: int) -> tuple[uvicorn.Server, socket.socket]:
    """A server with the guards and limits of `ServerThread` for an event loop of the caller's, and the socket that it
    serves: `await server.serve([sock])`. Raises RunFailed for a port that is taken."""
    return _server(app, host), _undelayed(ports.bind(host, port))


class ServerThread:
    """A uvicorn server in a daemon thread, on a socket that is bound already (`ports.bind`).

    With a `TokenGuard` as `app`, connections are limited in number, and those of strangers in time (`connections`).
    `host`: the name in the recipe under which it is reached, where that is no address.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket, host: str | None = None):
        self._server = _server(app, host)
        self._socket = _undelayed(sock)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return ports.url(host, port)

    @property
    def alive(self) -> bool:
        """The server's thread still runs."""
        return self._thread.is_alive()

    def start(self, timeout_s: float = 10.0) -> ServerThread:
        """Returns once requests are answered. Raises RunFailed when that does not happen."""
        self._thread.start()
        end = time.monotonic() + timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise RunFailed(f"the server did not start on {self.url}")
            time.sleep(0.005)
        return self

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the server; requests that still wait after a second are cut off."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout_s)
