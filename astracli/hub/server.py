"""A uvicorn server in a thread of this process, on a socket that is bound already."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from astracli.errors import RunFailed

KEEP_ALIVE_S = 75


class ServerThread:
    """A uvicorn server in a daemon thread, on a socket that is bound already."""

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
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])

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
                raise RunFailed(f"the hub's server did not start on {self.url}")
            time.sleep(0.005)
        return self

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the server; requests that still wait after a second are cut off."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout_s)
