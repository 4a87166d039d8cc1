"""The hub as an agent calls it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from astracli.errors import RunFailed
from astracli.process import intact

LINK_S = 0.25
"""How long one answer may take by which the link to the hub is measured."""
LINK_BYTES = 64 << 10, 64 << 20
"""Of the first such answer, and of the largest."""


class Hub:
    """The hub's routes for agents. Raises httpx.TransportError when it is not reached, RunFailed when it refuses."""

    def __init__(self, url: str, token: str):
        self._http = httpx.Client(base_url=url, timeout=30.0, trust_env=False, event_hooks=intact.hooks())
        self.url, self.token = url, token

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        reply = self._http.post(path, content=json.dumps(body), headers=self._headers)
        if reply.status_code == 401:
            raise Revoked("the hub does not take this agent's token")
        if reply.status_code >= 500:
            raise httpx.RemoteProtocolError(f"the hub answered {reply.status_code}")
        if reply.status_code >= 400:
            said = reply.json()
            raise RunFailed(f"the hub refused: {said['error']}", said.get("hint"))
        return reply

    def link(self) -> float | None:
        """Bytes/s that come from the hub's host; None when it says nothing of use. What is asked for grows until it
        takes `LINK_S`. Raises Revoked for a token that it does not take."""
        size, rate = LINK_BYTES[0], None
        while True:
            began = time.monotonic()
            reply = self._http.get("/agent/link", params={"bytes": size}, headers=self._headers)
            if reply.status_code == 401:
                raise Revoked("the hub does not take this agent's token")
            if reply.status_code >= 500:
                raise httpx.RemoteProtocolError(f"the hub answered {reply.status_code}")
            if reply.status_code != 200 or len(reply.content) != size:
                return rate
            seconds = time.monotonic() - began
            rate = size / max(seconds, 1e-6)
            if seconds > LINK_S / 2 or size == LINK_BYTES[1]:
                return rate
            size = min(max(4 * size, int(rate * LINK_S)), LINK_BYTES[1])

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def fetch(self, digest: str, size: int, path: Path) -> None:
        """A file that processes read. Raises RunFailed."""
        try:
            with (
                self._http.stream("GET", f"/agent/input/{digest}", headers=self._headers) as reply,
                path.open("wb") as file,
            ):
                if reply.status_code != 200:
                    raise RunFailed(f"the hub answered {reply.status_code} for a file of {size} bytes")
                for part in reply.iter_bytes(1 << 20):
                    file.write(part)
        except httpx.TransportError as error:
            raise RunFailed(f"a file of {size} bytes did not come: {error!r}") from None

    def close(self) -> None:
        self._http.close()


class Revoked(RunFailed):
    """The hub takes this agent's token no more: the run is over, or has given this host up."""
