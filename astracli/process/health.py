"""Whether a server of this run answers."""

from __future__ import annotations

import httpx


def answers(url: str, token: str, timeout_s: float = 1.0) -> bool:
    """GET `url` answers 200 under the run's token."""
    try:
        reply = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=timeout_s, trust_env=False)
    except httpx.TransportError:
        return False
    return reply.status_code == 200
