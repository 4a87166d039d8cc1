"""Whether a server of this run answers."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit


def answers(url: str, token: str, timeout_s: float = 1.0) -> bool:
    """GET `url` answers 200 under the run's token."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=timeout_s)
    try:
        connection.request("GET", address.path or "/", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
