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
"""How long the link to the hub is measured."""


class Hub:
    """The hub's routes for agents. Raises httpx.TransportError when it is not reached, RunFailed when it refuses."""

    def __init__(self, url: str, token: str):
        self._http = httpx.Client(base_url=url, timeout=30.0, trust_env=False, event_hooks=intact.hooks())
        self.url, self.token = url, token

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        reply = self._http.post(path, content=json.dumps(body), headers={"Authorization": f"Bearer {self.token}"})
        if reply.status_code == 401:
            raise Revoked("the hub does not take this agent's token")
        if reply.status_code >= 500:
            raise httpx.RemoteProtocolError(f"the hub answered {reply.status_code}")
        if reply.status_code >= 400:
            said = reply.json()
            raise RunFailed(f"the hub refused: {said['error']}", said.get("hint"))
        return reply

    def link(self) -> float | None:
        """Bytes/s that come from the hub's host, over `LINK_S` after the first; None when it says nothing of use.
        Raises Revoked for a token that it does not take."""
        began, got = 0.0, 0
        with self._http.stream("GET", "/agent/link", headers={"Authorization": f"Bearer {self.token}"}) as reply:
            if reply.status_code == 401:
                raise Revoked("the hub does not take this agent's token")
            if reply.status_code >= 500:
                raise httpx.RemoteProtocolError(f"the hub answered {reply.status_code}")
            if reply.status_code != 200:
                return None
            for part in reply.iter_raw():
                if not began:
                    began = time.monotonic()
                    continue
                got += len(part)
                if time.monotonic() - began > LINK_S:
                    break
        seconds = time.monotonic() - began
        return got / seconds if got and seconds > 0 else None

    def fetch(self, digest: str, size: int, path: Path) -> None:
        """A file that processes read. Raises RunFailed."""
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            with self._http.stream("GET", f"/agent/input/{digest}", headers=headers) as reply, path.open("wb") as file:
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
