"""Connections of a run's HTTP servers: how many there may be, how long a stranger may keep one, and open files.

A stranger is whoever has not shown the run's token. Anybody on this machine can connect to a local port; strangers must
not use up this process's descriptors, which its files and its own workers need.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from astracli.process.open_files import spare

TRUSTED = "astra.trusted"
"""Key in a request's scope: it carried the token (`server.TokenGuard`)."""
HEAD_S = 10.0
"""From the start of a connection until a request with the token has come."""
MOST = 1024
"""Connections to one server at once. The workers of a run keep a few dozen."""
FEWEST = 8


def most_connections() -> int:
    """Connections that a server of this process takes, with the descriptors that it has left."""
    return max(FEWEST, min(MOST, spare()))


class Guarded(H11Protocol):
    """An HTTP connection of a server with a token. Made by a subclass that sets the two class attributes."""

    most = MOST
    head_s = HEAD_S
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Beyond `most`, the oldest stranger goes; without one, the newcomer."""
        super().connection_made(transport)
        order: dict[Guarded, None] = self.app_state.setdefault("order", {})
        order[self] = None
        self._head = self.loop.call_later(self.head_s, self._no_head)
        if len(order) > self.most:
            (next((one for one in order if not one.trusted), self)).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self.app_state["order"].pop(self, None)
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    @property
    def trusted(self) -> bool:
        """Whether a request with the token has come."""
        scope: Any = self.scope
        return bool(scope) and TRUSTED in scope

    def drop(self) -> None:
        """End the connection without a word."""
        self.app_state["order"].pop(self, None)
        self.transport.abort()

    def _no_head(self) -> None:
        if not self.trusted:
            self.drop()
