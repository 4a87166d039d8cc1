"""An HTTP server in a thread of this process, and the check of the run's token that guards it."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from contextlib import suppress

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from astracli.errors import RunFailed

KEEP_ALIVE_S = 75


class TokenGuard:
    """ASGI middleware: a request without `Authorization: Bearer TOKEN` is answered with 401 and `refusal`."""

    def __init__(self, app: ASGIApp, token: str, refusal: JSONResponse):
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await self._refusal(scope, receive, send)
                return
        with suppress(ClientDisconnect):  # a client that ends in the middle of a request is no error of the server
            await self._app(scope, receive, send)


class ServerThread:
    """A uvicorn server in a daemon thread, on a socket that is bound already (`ports.bind`)."""

    def __init__(self, app: ASGIApp, sock: socket.socket):
        config = uvicorn.Config(
            app,
            loop="asyncio",  # `auto` takes whatever some other package installed
            http="h11",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        # asyncio sets this only on sockets that were made with proto=IPPROTO_TCP; without it an answer waits 40 ms
        # for a delayed acknowledgement.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{host}:{port}"

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
