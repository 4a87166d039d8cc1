"""Where processes of a run listen: free TCP ports, bound and never guessed; the address in a URL; its interface."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

import psutil

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


def held_ports(count: int, host: str, stack: ExitStack) -> list[int]:
    """`free_ports` that stay ours until `stack` is closed: no other program is given them by the system meanwhile.

    On Linux a port that is bound, and not listened on, can still be bound by whoever sets SO_REUSEADDR and names it, as
    engines and our store of ranks do. Elsewhere it could not, and nothing is held.
    """
    if sys.platform != "linux":
        return free_ports(count, host)
    return [stack.enter_context(bind(host)).getsockname()[1] for _ in range(count)]


def url(host: str, port: int) -> str:
    """`http://HOST:PORT`; an IPv6 address in its brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listens_beyond(host: str, processes: Iterable[psutil.Process]) -> list[str]:
    """Where processes of this user listen besides loopback and `host`, as `ADDRESS:PORT`."""
    own = {str(info[4][0]) for info in _known(host)}
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            for one in process.net_connections("tcp"):
                address = one.laddr.ip if one.status == psutil.CONN_LISTEN else "127.0.0.1"
                if not ipaddress.ip_address(address).is_loopback and address not in own:
                    found.add(f"[{address}]:{one.laddr.port}" if ":" in address else f"{address}:{one.laddr.port}")
    return sorted(found)


def _known(host: str) -> list[Any]:
    try:
        return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError:
        return []


def interface(host: str) -> str | None:
    """Name of the network interface that has the address `host`; None when none has."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None
    wanted = ipaddress.ip_address(str(address).partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family != family:
                continue
            has = ipaddress.ip_address(one.address.partition("%")[0])
            if has == wanted or (has.is_loopback and wanted.is_loopback):
                return str(name)
    return None
