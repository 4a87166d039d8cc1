"""Read by every Python process of a run under test (its folder is in PYTHONPATH): a clock that steps, connections that
pass through a relay, a file system that refuses locks. Each is switched on by an environment variable."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import socket
import time
from typing import Any

CLOCK = os.environ.get("ASTRA_FAULTS_CLOCK")
"""A file with the seconds that the clock is wrong by; it may change at any time."""
RELAY = os.environ.get("ASTRA_FAULTS_RELAY")
"""A folder: `port` holds the relay's, and a connection's own port names the file that says where it wants to go."""
LOCKS = os.environ.get("ASTRA_FAULTS_LOCKS")
"""What flock says instead of locking, by the name of its errno (ENOLCK: NFS without its lock daemon)."""

VERSION = os.environ.get("ASTRA_FAULTS_VERSION")
"""`NAME=VERSION`: the version that a package says it has."""

if VERSION:
    _version, _named = importlib.metadata.version, VERSION.split("=")
    importlib.metadata.version = lambda name: _named[1] if name == _named[0] else _version(name)

if CLOCK:
    _time, _time_ns, _monotonic = time.time, time.time_ns, time.monotonic
    _known = [0.0, -1.0]

    def _wrong_by() -> float:
        now = _monotonic()
        if now - _known[1] > 0.05:
            try:
                with open(CLOCK or "") as file:
                    _known[:] = [float(file.read() or 0.0), now]
            except (OSError, ValueError):
                _known[1] = now
        return _known[0]

    time.time = lambda: _time() + _wrong_by()  # type: ignore[assignment]
    time.time_ns = lambda: _time_ns() + int(_wrong_by() * 1e9)  # type: ignore[assignment]

if RELAY:
    _connect = socket.socket.connect

    def _relayed(sock: socket.socket, address: Any) -> None:
        if sock.family == socket.AF_INET and sock.type & socket.SOCK_STREAM and address[0] == "127.0.0.1":
            with open(f"{RELAY}/port") as file:
                relay = int(file.read())
            sock.bind(("127.0.0.1", 0))
            own = sock.getsockname()[1]
            with open(f"{RELAY}/.{own}", "w") as file:
                file.write(str(address[1]))
            os.replace(f"{RELAY}/.{own}", f"{RELAY}/{own}")
            address = ("127.0.0.1", relay)
        _connect(sock, address)

    socket.socket.connect = _relayed  # type: ignore[assignment,method-assign]

if LOCKS:

    def _refused(*_: Any) -> None:
        number = getattr(errno, LOCKS or "ENOLCK")
        raise OSError(number, os.strerror(number))

    fcntl.flock = _refused
