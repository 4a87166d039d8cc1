"""Free TCP ports: bound, never guessed."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from astracli.errors import RunFailed, UserError


def bind(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound socket; port 0 lets the system choose. Raises UserError when `host` is no address of this machine, and
    RunFailed for a certain port, which may also be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        message = f"cannot bind {host}:{port}: {error.strerror or error}"
        if port:
            hint = "another process holds the port, or launch.host is not an address of this machine"
            raise RunFailed(message, hint) from None
        raise UserError(message, "set launch.host to an address of this machine") from None
    return sock


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` different free ports for children that bind by themselves. All are held until all are known."""
    with ExitStack() as held:
        sockets = [held.enter_context(bind(host)) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]
